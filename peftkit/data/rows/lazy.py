"""Lazy sequences: items are made on access, and nothing holds all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class LazySequence(Sequence[T], Generic[T]):
    """A sequence that makes one item by its number; slices are lists."""

    @abstractmethod
    def _load(self, number: int) -> T:
        """Return the item of a number from 0 to the length less 1."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._load(number) for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        return self._load(number)


class Subset(LazySequence[T]):
    """A subset of a sequence's items by number, in the order of the numbers."""

    def __init__(self, items: Sequence[T], numbers: Sequence[int]) -> None:
        self._items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def _load(self, number: int) -> T:
        return self._items[self.numbers[number]]


class MappedSequence(LazySequence[T]):
    """A function applied to each item of a sequence on access."""

    def __init__(self, items: Sequence[object], function: Callable[[Any], T]) -> None:
        self._items, self._function = items, function

    def __len__(self) -> int:
        return len(self._items)

    def _load(self, number: int) -> T:
        return self._function(self._items[number])
