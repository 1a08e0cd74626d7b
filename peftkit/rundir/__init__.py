"""The run directory: everything that a run leaves behind, complete or absent, and owned by one process."""

from peftkit.rundir.disk import refuse_without_room
from peftkit.rundir.files import (
    MANIFEST,
    is_full,
    is_locked,
    publish_folder,
    read_json,
    read_sealed,
    sha256_of,
    verify_folder,
    verify_sealed,
    write_json,
    write_sealed,
    write_text,
)
from peftkit.rundir.lock import owned
from peftkit.rundir.run import RunDir, step_of

__all__ = [
    "MANIFEST",
    "RunDir",
    "is_full",
    "is_locked",
    "owned",
    "publish_folder",
    "read_json",
    "read_sealed",
    "refuse_without_room",
    "sha256_of",
    "step_of",
    "verify_folder",
    "verify_sealed",
    "write_json",
    "write_sealed",
    "write_text",
]
