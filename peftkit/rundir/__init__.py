"""The run directory: all files of a run, complete or absent, and locked by one process."""

from peftkit.rundir.disk import require_free_space
from peftkit.rundir.files import (
    MANIFEST,
    is_being_written,
    is_disk_full,
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
from peftkit.rundir.lock import lock_run
from peftkit.rundir.run import RunDir, step_of

__all__ = [
    "MANIFEST",
    "RunDir",
    "is_being_written",
    "is_disk_full",
    "lock_run",
    "publish_folder",
    "read_json",
    "read_sealed",
    "require_free_space",
    "sha256_of",
    "step_of",
    "verify_folder",
    "verify_sealed",
    "write_json",
    "write_sealed",
    "write_text",
]
