"""What was read and tokenized once, kept by content hash, so that a second run starts at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peftkit.cache import cache_folder

VERSION = 3  # of what is kept: another one starts afresh
_KEEP_BYTES = 20 * 2**30
_META = "meta.json"


def key_of(**parts: Any) -> str:
    """A hash of plain values: what a kept folder depends on."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _home(kind: str) -> Path:
    """Where folders of a kind are kept; a temporary folder where nothing can be written."""
    home = cache_folder() / kind
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        home = Path(tempfile.gettempdir()) / f"peftkit-{os.getuid()}" / kind
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home


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
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    """Remove the least recently used folders beyond so many bytes."""
    folders = []
    for path in home.iterdir():
        with suppress(OSError):  # another process may be pruning as well
            size = sum(file.stat().st_size for file in path.iterdir())
            folders.append((path.stat().st_mtime, size, path))
    total = sum(size for _, size, _ in folders)
    for _, size, path in sorted(folders):
        if total <= _KEEP_BYTES:
            return
        if path != keep and not path.name.startswith("."):
            shutil.rmtree(path, ignore_errors=True)
            total -= size
