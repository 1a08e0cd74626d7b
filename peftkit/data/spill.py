"""Rows on disk: JSON lines that are read by number, so that memory does not grow with the data."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

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


class Lines(Sequence[T], Generic[T]):
    """The values that a `Writer` wrote, decoded one at a time as they are asked for."""

    def __init__(self, path: Path, decode: Callable[[Any], T], *, places: array[int] | None = None) -> None:
        self._at = load_numbers(path.with_suffix(".at")) if places is None else places
        self._decode = decode
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self._at) > 1 else b""

    def __len__(self) -> int:
        return len(self._at) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._decode(json.loads(self._map[self._at[index] : self._at[index + 1]]))


class Picked(Sequence[T], Generic[T]):
    """Some of a sequence's items, by number, in the order of the numbers."""

    def __init__(self, items: Sequence[T], numbers: Sequence[int]) -> None:
        self._items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._items[number] for number in self.numbers[index]]
        return self._items[self.numbers[index]]

    def __iter__(self) -> Iterator[T]:
        return (self._items[number] for number in self.numbers)
