"""What was read and tokenized once, kept by content hash, so that a second run starts at once."""

from __future__ import annotations

import atexit
import errno
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

VERSION = 10  # of what is kept: another one starts afresh
_KEEP_BYTES = 20 * 2**30
_UNFINISHED_SECONDS = 14 * 86_400
_META = "meta.json"


def key_of(**parts: Any) -> str:
    """A hash of plain values: what a kept folder depends on."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _home(kind: str) -> Path:
    """Where folders of a kind are kept; a folder of this process alone where nothing can be written there."""
    home = cache_folder() / kind
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return _own(kind)
    return home if os.access(home, os.W_OK) else _own(kind)


@lru_cache
def _own(kind: str) -> Path:
    """A temporary folder, gone with the process."""
    folder = Path(tempfile.mkdtemp(prefix=f"peftkit-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def _with_room() -> Iterator[None]:
    """A full disk as a problem that can be mended."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        got = f"no room left ({error.strerror})"
        fix = "make room, or set PEFTKIT_CACHE to a folder on another disk"
        raise UserError(Problem(str(cache_folder()), got, "room for rows and tokens", fix)) from None


def find(kind: str, key: str) -> tuple[Path, dict[str, Any]] | None:
    """(folder, meta) of what is kept whole under a key; None where it is not, or was cut."""
    folder = _home(kind) / key
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    if not whole:
        return None
    with suppress(OSError):
        os.utime(folder)  # the least recently used go first
    return folder, meta


@contextmanager
def making(kind: str, key: str) -> Iterator[Path]:
    """A fresh folder to fill. `publish` makes it the kept one; without that, or on an error, it is gone."""
    folder = Path(tempfile.mkdtemp(prefix=f".{key[:12]}-", dir=_home(kind)))
    try:
        with _with_room():
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def going_on(kind: str, key: str) -> Iterator[Path]:
    """A folder to fill that stays when filling is interrupted, to go on with later.

    Where another process fills it, a fresh one. `publish` makes it the kept one.
    """
    import fcntl

    home = _home(kind)
    with (home / f".{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with making(kind, key) as folder:
                yield folder
            return
        folder = home / f".{key}.going"
        folder.mkdir(exist_ok=True, mode=0o700)
        with _with_room():
            yield folder
        shutil.rmtree(folder, ignore_errors=True)
        (home / f".{key}.lock").unlink(missing_ok=True)


def publish(folder: Path, kind: str, key: str, meta: Mapping[str, Any]) -> Path:
    """Keep a filled folder under its key: complete or not at all. Another's that came first is as good."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _META).write_text(json.dumps({**meta, "sizes": sizes}), encoding="utf-8")
    target = _home(kind) / key
    if find(kind, key) is None:
        shutil.rmtree(target, ignore_errors=True)
        try:
            folder.rename(target)
        except OSError:
            if find(kind, key) is None:
                raise
    _prune(target.parent, keep=target)
    return target


def _prune(home: Path, *, keep: Path) -> None:
    """Remove what was never finished, and the least recently used folders beyond so many bytes."""
    folders = []
    for path in home.iterdir():
        with suppress(OSError):  # another process may be pruning as well
            used = path.stat().st_mtime
            if path.name.startswith("."):
                if path.is_dir() and time.time() - used > _UNFINISHED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            folders.append((used, sum(file.stat().st_size for file in path.iterdir()), path))
    total = sum(size for _, size, _ in folders)
    for _, size, path in sorted(folders):
        if total <= _KEEP_BYTES:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
