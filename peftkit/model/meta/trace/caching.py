"""Simulation of CUDA's caching allocator: the bytes it reserves for a record of allocations and frees.

The rules are those of PyTorch's CUDACachingAllocator (its documented defaults): blocks of up to 1 MiB come
from segments of 2 MiB, larger ones from segments of 20 MiB below 10 MiB and of multiples of 2 MiB beyond;
best fit, split where enough remains, coalesced with free neighbours. Nothing is returned to the driver.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MIB = 2**20
_MAX_SMALL_BYTES = _MIB


@dataclass
class _Piece:
    """A contiguous range of a segment, linked to its neighbours."""

    segment: int
    offset: int
    size: int
    free: bool
    before: _Piece | None = None
    after: _Piece | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        return self.size, self.segment, self.offset


class _Pool:
    """The free pieces of small or of large segments, smallest first."""

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.keys: list[tuple[int, int, int]] = []
        self.pieces: dict[tuple[int, int, int], _Piece] = {}

    def add(self, piece: _Piece) -> None:
        piece.free = True
        bisect.insort(self.keys, piece.key)
        self.pieces[piece.key] = piece

    def take(self, piece: _Piece) -> None:
        self.keys.pop(bisect.bisect_left(self.keys, piece.key))
        del self.pieces[piece.key]
        piece.free = False

    def best_fit(self, size: int) -> _Piece | None:
        index = bisect.bisect_left(self.keys, (size, -1, -1))
        return self.pieces[self.keys[index]] if index < len(self.keys) else None

    def segment_size(self, size: int) -> int:
        if self.small:
            return 2 * _MIB
        return 20 * _MIB if size < 10 * _MIB else -(-size // (2 * _MIB)) * 2 * _MIB

    def splits(self, remainder: int) -> bool:
        return remainder >= 512 if self.small else remainder > _MIB


def _coalesce(pool: _Pool, piece: _Piece) -> _Piece:
    """Coalesce a freed piece with its free neighbours. Returns the joined piece."""
    following = piece.after
    if following is not None and following.free:
        pool.take(following)
        piece.size, piece.after = piece.size + following.size, following.after
        if following.after is not None:
            following.after.before = piece
    previous = piece.before
    if previous is not None and previous.free:
        pool.take(previous)
        previous.size, previous.after = previous.size + piece.size, piece.after
        if piece.after is not None:
            piece.after.before = previous
        return previous
    return piece


def simulate_reserved_bytes(sizes: Sequence[int], events: Iterable[tuple[int, bool]]) -> int:
    """Simulate the allocator and return the bytes that it reserves on the device.

    `sizes` are bytes by block, multiples of 512; `events` are (block, is allocation) in order.
    A block of 1 MiB, freed, then one of 0.5 MiB reserve one segment of 2 MiB.
    """
    pools = {True: _Pool(small=True), False: _Pool(small=False)}
    pieces_by_block: dict[int, _Piece] = {}
    reserved = num_segments = 0
    for block, is_allocation in events:
        size = sizes[block]
        if size == 0:
            continue
        pool = pools[size <= _MAX_SMALL_BYTES]
        if not is_allocation:
            pool.add(_coalesce(pool, pieces_by_block.pop(block)))
            continue
        piece = pool.best_fit(size)
        if piece is None:
            num_segments += 1
            piece = _Piece(num_segments, 0, pool.segment_size(size), free=False)
            reserved += piece.size
        else:
            pool.take(piece)
        if pool.splits(piece.size - size):
            remainder = _Piece(piece.segment, piece.offset + size, piece.size - size, True, piece, piece.after)
            if piece.after is not None:
                piece.after.before = remainder
            piece.size, piece.after = size, remainder
            pool.add(remainder)
        pieces_by_block[block] = piece
    return reserved
