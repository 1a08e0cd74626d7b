"""On-disk cache of read rows and tokens by content hash, so that a second run starts at once."""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.hub import cache_folder

FORMAT_VERSION = 16  # of what is kept: another one starts afresh
_MAX_BYTES = 20 * 2**30
_MAX_UNFINISHED_SECONDS = 14 * 86_400
_META_FILE = "meta.json"


def content_key(**parts: object) -> str:
    """Return the content hash of plain values: 40 hex digits that name a cache entry."""
    text = json.dumps({"version": FORMAT_VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _cache_root(kind: str) -> Path:
    """Return the folder of one kind of entry; a folder of this process alone where it is not writable."""
    home = cache_folder() / kind
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return _temporary_root(kind)
    return home if os.access(home, os.W_OK) else _temporary_root(kind)


@lru_cache
def _temporary_root(kind: str) -> Path:
    """Create a temporary folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"peftkit-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def _report_full_disk() -> Iterator[None]:
    """Raise UserError for a full disk or an exceeded quota."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        got = f"no disk space left ({error.strerror})"
        fix = "free disk space, or set PEFTKIT_CACHE to a folder on another disk"
        raise UserError(Problem(str(cache_folder()), got, "disk space for rows and tokens", fix)) from None


def find_entry(kind: str, key: str) -> tuple[Path, dict[str, Any]] | None:
    """Return (folder, meta) of a complete entry; None where it is missing or truncated."""
    folder = _cache_root(kind) / key
    try:
        meta = json.loads((folder / _META_FILE).read_text(encoding="utf-8"))
        is_complete = all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    if not is_complete:
        return None
    with suppress(OSError):
        os.utime(folder)  # the least recently used go first
    return folder, meta


@contextmanager
def new_entry(kind: str, key: str) -> Iterator[Path]:
    """Yield a fresh folder to fill, removed at the end unless `publish_entry` made it the entry."""
    folder = Path(tempfile.mkdtemp(prefix=f".{key[:12]}-", dir=_cache_root(kind)))
    try:
        with _report_full_disk():
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def resumable_entry(kind: str, key: str) -> Iterator[Path]:
    """Yield a folder to fill that stays when filling is interrupted, so that a later run can continue.

    Where another process is filling it, yield a fresh one. `publish_entry` makes it the entry.
    """
    home = _cache_root(kind)
    with (home / f".{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with new_entry(kind, key) as folder:
                yield folder
            return
        folder = home / f".{key}.going"
        folder.mkdir(exist_ok=True, mode=0o700)
        with _report_full_disk():
            yield folder
        shutil.rmtree(folder, ignore_errors=True)
        (home / f".{key}.lock").unlink(missing_ok=True)


def publish_entry(folder: Path, kind: str, key: str, meta: Mapping[str, object]) -> Path:
    """Move a filled folder to its key, whole or not at all. An entry that came first is kept."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _META_FILE).write_text(json.dumps({**meta, "sizes": sizes}), encoding="utf-8")
    target = _cache_root(kind) / key
    if find_entry(kind, key) is None:
        shutil.rmtree(target, ignore_errors=True)
        try:
            folder.rename(target)
        except OSError:
            if find_entry(kind, key) is None:
                raise
    _prune(target.parent, protected=target)
    return target


def _prune(home: Path, *, protected: Path) -> None:
    """Remove unfinished folders, then the least recently used entries beyond `_MAX_BYTES`."""
    folders = []
    for path in home.iterdir():
        with suppress(OSError):  # another process may be pruning as well
            mtime = path.stat().st_mtime
            if path.name.startswith("."):
                if path.is_dir() and time.time() - mtime > _MAX_UNFINISHED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            folders.append((mtime, sum(file.stat().st_size for file in path.iterdir()), path))
    total = sum(size for _, size, _ in folders)
    for _, size, path in sorted(folders):
        if total <= _MAX_BYTES:
            return
        if path != protected:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
