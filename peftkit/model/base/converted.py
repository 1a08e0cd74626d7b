"""What comes in another form, converted once to a folder in the cache that is complete or absent.

GGUF files and quantized checkpoints to bases, LoRA of single experts to that of fused ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peftkit import interrupt
from peftkit.errors import Problem, UserError
from peftkit.hub import cache_folder
from peftkit.rundir import publish_folder, verify_folder
from peftkit.rundir.disk import explain_disk_errors


def converted_once(place: str, write: Callable[[Path], None], *, source: str, source_sha256: str) -> Path:
    """Return a folder of the cache; `write` fills it where it is not there yet.

    `place` is its kind and a name that tells the source and the version of the conversion apart: bases/NAME. Raises
    UserError where the folder is damaged, or cannot be written.
    """
    folder = cache_folder() / place
    faults = verify_folder(folder, hashes=False)
    if not faults:
        return folder
    if folder.exists():
        fix = "remove this folder; it is then converted again"
        raise UserError(Problem(str(folder), "; ".join(faults), "a complete conversion", fix))
    with explain_disk_errors(folder):
        try:
            with publish_folder(folder, source=source, source_sha256=source_sha256) as staging:
                write(staging)
                interrupt.stop_if_requested("interrupted while converting; nothing is left of it")
        except OSError:
            if verify_folder(folder, hashes=False):
                raise
            # another process was faster: its conversion of the same bytes is as good
    return folder
