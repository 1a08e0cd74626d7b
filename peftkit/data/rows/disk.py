"""Rows on disk: JSON lines that are read by number, so that memory does not grow with the data."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peftkit.data.rows.lazy import Lazy

T = TypeVar("T")
_WRITE_BYTES = 2**20
_encode = json.JSONEncoder(ensure_ascii=False).encode


class Writer:
    """Appends values to `path`; the place of each goes to `path`.at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=_WRITE_BYTES)
        self._at = array("Q", [0])

    def append(self, value: Any) -> None:
        """One value, as a line of JSON."""
        self._at.append(self._at[-1] + self._file.write(_encode(value).encode() + b"\n"))

    def __len__(self) -> int:
        return len(self._at) - 1

    def flush(self) -> array[int]:
        """Make what was appended readable. Returns the places."""
        self._file.flush()
        return self._at

    def close(self) -> None:
        """Write out what is left, and the places."""
        self._file.close()
        save_numbers(self._path.with_suffix(".at"), self._at)


def save_numbers(path: Path, numbers: array[int]) -> None:
    """Whole numbers, as the machine holds them."""
    with path.open("wb") as file:
        numbers.tofile(file)


def load_numbers(path: Path) -> array[int]:
    """The 64-bit numbers that `save_numbers` wrote."""
    found = array("Q")
    found.frombytes(path.read_bytes())
    return found


class Lines(Lazy[T]):
    """The values that a `Writer` wrote, decoded one at a time as they are asked for."""

    def __init__(self, path: Path, decode: Callable[[Any], T], *, places: array[int] | None = None) -> None:
        self._at = load_numbers(path.with_suffix(".at")) if places is None else places
        self._decode = decode
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self._at) > 1 else b""

    def __len__(self) -> int:
        return len(self._at) - 1

    def _make(self, number: int) -> T:
        return self._decode(json.loads(self._map[self._at[number] : self._at[number + 1]]))
