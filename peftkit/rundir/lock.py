"""One process owns a run directory: a lock that a dead process cannot keep."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError

LOCK = "run.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def boot_id() -> str:
    """Which start of which machine this is; containers on it share it. Empty where the system tells none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _holder() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot_id": boot_id(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _written(handle: int) -> dict[str, Any]:
    """Who the file says holds it; empty where it was released, or cut short by a kill."""
    try:
        found = json.loads(os.pread(handle, 4096, 0).decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refuse(folder: Path, holder: dict[str, Any], fix: str) -> UserError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    got = f"a run that {who} works on, since {holder.get('since', '?')}"
    return UserError(Problem(str(folder), got, "a run that no other process owns", fix))


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, TypeError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _take(handle: int, folder: Path, *, take_over: bool) -> None:
    """Lock the open file, or raise UserError with who has it."""
    wait = "wait until it ends, or stop it"
    locks = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refuse(folder, _written(handle), wait) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        locks = False
    holder = _written(handle)
    if not holder:
        return
    if holder.get("boot_id") == boot_id() and holder.get("host") == socket.gethostname():
        # the system lets go of a dead process's lock; where it has none, the pid tells
        if not locks and _is_alive(holder.get("pid")) and not take_over:
            raise _refuse(folder, holder, wait)
    elif not take_over and holder.get("boot_id") != boot_id() and holder.get("host") != socket.gethostname():
        # another machine, whose locks this file system may not show
        raise _refuse(folder, holder, f"if that machine is gone: peftkit resume {folder} --take-over")


@contextmanager
def owned(folder: Path, *, take_over: bool = False) -> Iterator[None]:
    """Own a run directory while the block runs. Raises UserError where another process does.

    The lock goes with its process, however that ends: flock's on this machine and over NFS. A file that
    another machine wrote and did not release is believed, unless `take_over` says that the machine is gone.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        _take(handle, folder, take_over=take_over)
        text = json.dumps(_holder()).encode()
        os.pwrite(handle, text, 0)
        os.ftruncate(handle, len(text))
        try:
            yield
        finally:
            os.ftruncate(handle, 0)  # not unlinked: another may have opened it already
    finally:
        os.close(handle)
