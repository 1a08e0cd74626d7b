"""Room on the disk, looked at before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.units import show_bytes


def refuse_without_room(folder: Path, num_bytes: int, *, what: str, fix: str) -> None:
    """Raises UserError where less than `num_bytes` are free on a folder's disk. It may be still to come."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        got = f"{show_bytes(free)} free for {what}"
        raise UserError(Problem(str(folder), got, f"{show_bytes(num_bytes)} free", fix))
