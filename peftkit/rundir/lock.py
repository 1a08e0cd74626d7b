"""The lock of a run directory: one process owns it, and a dead process cannot keep it."""

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
    """Return the id of this machine's boot, shared by its containers; empty if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _read_holder(handle: int) -> dict[str, Any]:
    """Read the holder from the lock file; empty if it was released, or cut short by a kill."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0).decode())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _locked_error(folder: Path, holder: dict[str, Any], fix: str) -> UserError:
    """Build the UserError that names the process that holds the lock."""
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


@contextmanager
def lock_run(folder: Path, *, take_over: bool = False) -> Iterator[None]:
    """Lock a run directory while the block runs. Raises UserError if another process holds it.

    The lock ends with its process, however that ends: flock's on this machine and over NFS. A file that
    another machine wrote and did not release is believed, unless `take_over` says that the machine is gone.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise _unwritable_error(folder, error) from None
    try:
        wait_fix = "wait until it ends, or stop it"
        has_locks = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked_error(folder, _read_holder(handle), wait_fix) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            has_locks = False
        holder = _read_holder(handle)
        if holder and not take_over:
            take_over_fix = f"if that machine is gone: peftkit resume {folder} --take-over"
            same_boot, same_host = holder.get("boot_id") == boot_id(), holder.get("host") == socket.gethostname()
            if has_locks:
                # the system lets go of a dead process's lock, and a machine that was started anew has the same name;
                # another machine's locks this file system may not show
                if not same_boot and not same_host:
                    raise _locked_error(folder, holder, take_over_fix)
            elif not (same_boot and same_host):
                raise _locked_error(folder, holder, take_over_fix)
            elif _is_alive(holder.get("pid")):
                raise _locked_error(folder, holder, wait_fix)
        text = json.dumps(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "boot_id": boot_id(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        ).encode()
        try:
            os.pwrite(handle, text, 0)
            os.ftruncate(handle, len(text))
        except OSError as error:
            raise _unwritable_error(folder, error) from None
        try:
            yield
        finally:
            os.ftruncate(handle, 0)  # not unlinked: another may have opened it already
    finally:
        os.close(handle)


def _unwritable_error(folder: Path, error: OSError) -> UserError:
    got = f"a folder whose {LOCK} cannot be written ({error.strerror})"
    return UserError(Problem(str(folder), got, "a run to write into", "free disk space, or fix its permissions"))
