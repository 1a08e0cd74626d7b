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
    gone = f"if that machine is gone: peftkit resume {folder} --take-over"
    same_boot, same_host = holder.get("boot_id") == boot_id(), holder.get("host") == socket.gethostname()
    if take_over:
        return
    if locks:
        # the system lets go of a dead process's lock, and a machine that was started anew has the same name;
        # another machine's locks this file system may not show
        if not same_boot and not same_host:
            raise _refuse(folder, holder, gone)
    elif not (same_boot and same_host):
        raise _refuse(folder, holder, gone)
    elif _is_alive(holder.get("pid")):
        raise _refuse(folder, holder, wait)


@contextmanager
def owned(folder: Path, *, take_over: bool = False) -> Iterator[None]:
    """Own a run directory while the block runs. Raises UserError where another process does.

    The lock goes with its process, however that ends: flock's on this machine and over NFS. A file that
    another machine wrote and did not release is believed, unless `take_over` says that the machine is gone.
    """
    handle = _opened(folder)
    try:
        _take(handle, folder, take_over=take_over)
        _write(handle, folder)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)  # not unlinked: another may have opened it already
    finally:
        os.close(handle)


def _opened(folder: Path) -> int:
    try:
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _write(handle: int, folder: Path) -> None:
    """Say who has it now."""
    text = json.dumps(_holder()).encode()
    try:
        os.pwrite(handle, text, 0)
        os.ftruncate(handle, len(text))
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    got = f"a folder whose {LOCK} cannot be written ({error.strerror})"
    return UserError(Problem(str(folder), got, "a run to write into", "make room, or mend its permissions"))
