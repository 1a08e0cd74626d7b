"""Rows on disk: JSON lines read by number through mmap, so that memory does not grow with the data."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peftkit.data.rows.lazy import LazySequence

T = TypeVar("T")
_WRITE_BYTES = 2**20
_encode = json.JSONEncoder(ensure_ascii=False).encode


class JsonLinesWriter:
    """Writer of values to JSON lines in `path`; their byte offsets go to the same name with suffix .at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=_WRITE_BYTES)
        self._offsets = array("Q", [0])

    def append(self, value: object) -> None:
        """Append one value as a line of JSON."""
        self._offsets.append(self._offsets[-1] + self._file.write(_encode(value).encode() + b"\n"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def flush(self) -> array[int]:
        """Make appended values readable. Returns the byte offsets."""
        self._file.flush()
        return self._offsets

    def close(self) -> None:
        """Close the file and write the byte offsets."""
        self._file.close()
        save_numbers(self._path.with_suffix(".at"), self._offsets)


def save_numbers(path: Path, numbers: array[int]) -> None:
    """Write integers to a file in the machine's byte order."""
    with path.open("wb") as file:
        numbers.tofile(file)


def load_numbers(path: Path) -> array[int]:
    """Read the 64-bit integers that `save_numbers` wrote."""
    numbers = array("Q")
    numbers.frombytes(path.read_bytes())
    return numbers


class JsonLinesReader(LazySequence[T]):
    """Reader of the values that a `JsonLinesWriter` wrote, decoded one at a time on access."""

    def __init__(self, path: Path, decode: Callable[[Any], T], *, offsets: array[int] | None = None) -> None:
        self._offsets = load_numbers(path.with_suffix(".at")) if offsets is None else offsets
        self._decode = decode
        with path.open("rb") as file:
            self._mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self._offsets) > 1 else b""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _load(self, number: int) -> T:
        return self._decode(json.loads(self._mmap[self._offsets[number] : self._offsets[number + 1]]))
