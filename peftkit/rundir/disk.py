"""What an output needs before anything is written: free disk space, and a folder that can be made."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.rundir.files import is_disk_full
from peftkit.units import show_bytes

_MAX_NAME_BYTES = 200  # file systems allow 255 bytes, and temporary names are longer
_OTHER_OUT_FIX = "choose another --out"


def require_free_space(folder: Path, num_bytes: int, *, what: str, fix: str) -> None:
    """Raise UserError if a folder's disk has less than `num_bytes` free. The folder may not exist yet."""
    existing_parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing_parent).free
    if num_bytes > free:
        got = f"{show_bytes(free)} free for {what}"
        raise UserError(Problem(str(folder), got, f"{show_bytes(num_bytes)} free", fix))


def resolve_new_folder(out: str | Path) -> Path:
    """Return the resolved path of a new folder. Raises UserError where it cannot become one."""
    if any(len(part.encode()) > _MAX_NAME_BYTES for part in Path(out).parts):
        got = f"a name of {max(len(part.encode()) for part in Path(out).parts)} bytes"
        raise UserError(Problem(str(out)[:80], got, f"at most {_MAX_NAME_BYTES}", _OTHER_OUT_FIX))
    path = Path(out).resolve()
    parent = next(folder for folder in path.parents if folder.exists())
    problem = None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        problem = "a folder that is not empty" if path.is_dir() else "a file"
    elif path == Path.cwd():
        problem = "the current folder"
    elif not parent.is_dir():
        problem = f"a path inside a file ({parent})"
    if problem:
        raise UserError(Problem(str(out), problem, "a new or empty folder", _OTHER_OUT_FIX))
    return path


@contextmanager
def explain_disk_errors(out: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Raise UserError for disk errors: disk full, no write permission, or the folder was filled meanwhile."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            expected = "enough free space" if num_bytes is None else f"{show_bytes(num_bytes)} free"
            fix = f"make room, or {_OTHER_OUT_FIX}; no partial files are left"
            got = f"a full disk ({error.strerror or error})"
        elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            got, expected, fix = (f"no write permission ({error.strerror})", "a writable folder", _OTHER_OUT_FIX)
        elif error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            got, expected, fix = ("a folder that another program wrote to meanwhile", "a new folder", _OTHER_OUT_FIX)
        else:
            raise
        raise UserError(Problem(str(out), got, expected, fix)) from error


def next_free_path(path: Path) -> Path:
    """Return a path, or the same with -2, -3 and so on where that exists."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
