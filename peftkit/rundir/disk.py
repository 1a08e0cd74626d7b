"""Room on the disk, looked at before anything is written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.rundir.files import is_full
from peftkit.units import show_bytes


def refuse_without_room(folder: Path, num_bytes: int, *, what: str, fix: str) -> None:
    """Raises UserError where less than `num_bytes` are free on a folder's disk. It may be still to come."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        got = f"{show_bytes(free)} free for {what}"
        raise UserError(Problem(str(folder), got, f"{show_bytes(num_bytes)} free", fix))


_LONGEST_NAME = 200  # file systems allow 255 bytes, and temporary names are longer
_OTHER = "choose another --out"


def new_folder(out: str | Path) -> Path:
    """The place itself, links followed. Raises UserError where it cannot become a new folder."""
    if any(len(part.encode()) > _LONGEST_NAME for part in Path(out).parts):
        got = f"a name of {max(len(part.encode()) for part in Path(out).parts)} bytes"
        raise UserError(Problem(str(out)[:80], got, f"at most {_LONGEST_NAME}", _OTHER))
    path = Path(out).resolve()
    parent = next(folder for folder in path.parents if folder.exists())
    problem = None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        problem = "a folder that is not empty" if path.is_dir() else "a file"
    elif path == Path.cwd():
        problem = "the folder that you are in"
    elif not parent.is_dir():
        problem = f"a place inside of a file ({parent})"
    if problem:
        raise UserError(Problem(str(out), problem, "a new or empty folder", _OTHER))
    return path


@contextmanager
def problems_told(out: Path, num_bytes: int | None = None) -> Iterator[None]:
    """What the disk refuses is the user's to mend: no room, no right to write, or another was faster."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            needed = "room for all of it" if num_bytes is None else f"{show_bytes(num_bytes)} free"
            fix = f"make room, or {_OTHER}; nothing half-written is left"
            got = f"a disk that is full ({error.strerror or error})"
        elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            got, needed, fix = f"no right to write ({error.strerror})", "a folder to write to", _OTHER
        elif error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            got, needed, fix = "a folder that another program filled meanwhile", "a new folder", _OTHER
        else:
            raise
        raise UserError(Problem(str(out), got, needed, fix)) from error
