"""Files that are whole or absent, however the writing ends.

A folder that matters (a checkpoint, an adapter, a converted base) is written to a temporary sibling, fsynced,
its manifest of sizes and sha256 last, renamed into place, and read again. A folder without a valid manifest
is never trusted.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.secrets import redact_value

MANIFEST = "MANIFEST.json"
TEMPORARY_PREFIX = ".tmp-"
_LEFTOVER_NAME = re.compile(  # what stands in a run, and the eight characters of tempfile
    r"\.tmp-(?:(?:resolved\.yaml|recipe\.yaml|plan\.json|data\.json|environment\.json|events\.jsonl|step-\d{6,}"
    r"|adapter|adapter_start|model|trainer_state\.json)-[a-z0-9_]{8}|writable|handover|old-step-\d{6,})$"
)
_SEAL = "sha256"
_DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def is_disk_full(error: BaseException) -> bool:
    """Return True if an error means that the disk or the quota is full, or a file too large."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL_ERRNOS
    match = _OS_ERROR.search(str(error))  # safetensors' own errors hold the system's in their text
    return match is not None and int(match[1]) in _DISK_FULL_ERRNOS


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON by `write_text`."""
    write_text(path, _json_text(value))


def _json_text(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Return the parsed content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _content_hash(value: Mapping[str, object]) -> str:
    rest = {key: item for key, item in value.items() if key != _SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_sealed(path: Path, value: Mapping[str, object]) -> None:
    """Write redacted JSON with a hash of its content inside, so that a later change is detected."""
    content = json.loads(
        json.dumps(redact_value(value), ensure_ascii=False)
    )  # tuples and number keys as they come back
    write_json(path, {**content, _SEAL: _content_hash(content)})


def verify_sealed(path: Path) -> list[str]:
    """Return the faults of a sealed file, in words; an empty list if it is unchanged."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return [f"{path.name} is missing"]
    except (OSError, ValueError) as error:
        return [f"{path.name} cannot be read ({error})"]
    if not isinstance(value, dict) or not isinstance(value.get(_SEAL), str):
        return [f"{path.name} has no hash of its content"]
    if value[_SEAL] != _content_hash(value) or path.read_text(encoding="utf-8") != _json_text(value):
        return [f"{path.name} was changed after it was written"]
    return []


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the value of a sealed file. Raises UserError if it was changed."""
    if faults := verify_sealed(path):
        expected, fix = "the file as peftkit wrote it", "restore the file, or train again"
        raise UserError(Problem(str(path), faults[0], expected, fix))
    return {key: item for key, item in read_json(path).items() if key != _SEAL}


@contextmanager
def publish_folder(
    final: Path, *, known_hashes: Mapping[str, str] | None = None, sealed: bool = True, **facts: object
) -> Iterator[Path]:
    """Yield a temporary sibling to write into; on success it becomes `final`, with a manifest.

    `facts` are stored in the manifest beside the files' sizes and hashes. `known_hashes` has the sha256 of
    files that were hashed in memory, by name: the disk's content is compared with them. An exception, or a
    kill at any moment, leaves no `final`; an exception also removes the temporary folder. Raises OSError if
    the disk returns other bytes than were written. Without `sealed` there is no manifest and nothing is read
    again, for content that is verified before it is published.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=final.parent, prefix=f"{TEMPORARY_PREFIX}{final.name}-"))
    handle = os.open(staging, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every network's file system has locks
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # it is being written: see is_locked
        yield staging
        staging.chmod(0o755)
        entries = {}
        for path in sorted(path for path in staging.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            name = path.relative_to(staging).as_posix()
            if sealed:
                digest = (known_hashes or {}).get(name) or sha256_of(path)
                entries[name] = {"size_bytes": path.stat().st_size, "sha256": digest}
        for folder in (path for path in staging.rglob("*") if path.is_dir()):
            _fsync_folder(folder)
        if sealed:
            write_sealed(staging / MANIFEST, {**facts, "files": entries})
            if faults := verify_folder(staging):
                raise OSError(errno.EIO, f"the disk does not give back what was written: {faults[0]}")
        staging.rename(final)
        _fsync_folder(final.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def is_being_written(folder: Path) -> bool:
    """Return True if a process is writing into a temporary folder of `publish_folder` right now."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def verify_folder(folder: Path, *, hashes: bool = True) -> list[str]:
    """Return the faults of a published folder, in words; an empty list if every file is unchanged.

    `hashes=False` compares sizes only: enough to know that a write was finished, at no cost. A manifest that
    names files elsewhere is not trusted, and links are not followed.
    """
    try:
        entries = read_json(folder / MANIFEST)["files"].items()
        sizes = {name: (int(entry["size_bytes"]), str(entry["sha256"])) for name, entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return [f"{folder.name} is incomplete (no {MANIFEST})"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{folder.name} has an unreadable {MANIFEST}"]
    faults = [f"{folder.name}/{fault}" for fault in verify_sealed(folder / MANIFEST)]
    for name, (size_bytes, digest) in sizes.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            faults.append(f"{folder.name} has a {MANIFEST} that names a file elsewhere ({name})")
        elif path.is_symlink() or not path.is_file():
            faults.append(f"{folder.name}/{name} is missing")
        elif path.stat().st_size != size_bytes:
            faults.append(f"{folder.name}/{name} has {path.stat().st_size} bytes, not {size_bytes}")
        elif hashes and sha256_of(path) != digest:
            faults.append(f"{folder.name}/{name} was changed after it was written (sha256 differs)")
    return faults


def is_leftover(name: str) -> bool:
    """Return True if a file or folder is the leftover of one of our writes."""
    return _LEFTOVER_NAME.match(name) is not None


def remove_leftovers(folder: Path) -> list[str]:
    """Remove the leftovers of interrupted writes from a folder. Returns the names.

    Only for a folder that the caller owns: another writer's temporary files look the same.
    """
    leftovers = sorted(path for path in folder.iterdir() if is_leftover(path.name)) if folder.is_dir() else []
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in leftovers]
