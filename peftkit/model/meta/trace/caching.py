"""What CUDA's caching allocator reserves for a record of allocations and frees.

The rules are those of PyTorch's CUDACachingAllocator (its documented defaults): blocks of up to 1 MiB come
from segments of 2 MiB, larger ones from segments of 20 MiB below 10 MiB and of multiples of 2 MiB beyond;
best fit, split where enough is left over, merged with free neighbours. Nothing is given back to the driver.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MIB = 2**20
_SMALL = _MIB


@dataclass
class _Piece:
    """A stretch of a segment; neighbours are linked."""

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
    """Free pieces of one kind of segment, smallest first."""

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
        at = bisect.bisect_left(self.keys, (size, -1, -1))
        return self.pieces[self.keys[at]] if at < len(self.keys) else None

    def segment_size(self, size: int) -> int:
        if self.small:
            return 2 * _MIB
        return 20 * _MIB if size < 10 * _MIB else -(-size // (2 * _MIB)) * 2 * _MIB

    def splits(self, rest: int) -> bool:
        return rest >= 512 if self.small else rest > _MIB


def _merge(pool: _Pool, piece: _Piece) -> _Piece:
    """A piece that was given back, joined with its free neighbours."""
    after = piece.after
    if after is not None and after.free:
        pool.take(after)
        piece.size, piece.after = piece.size + after.size, after.after
        if after.after is not None:
            after.after.before = piece
    before = piece.before
    if before is not None and before.free:
        pool.take(before)
        before.size, before.after = before.size + piece.size, piece.after
        if piece.after is not None:
            piece.after.before = before
        return before
    return piece


def reserved_bytes(sizes: Sequence[int], events: Iterable[tuple[int, bool]]) -> int:
    """The most that the allocator holds of the device.

    `sizes` are bytes by block, multiples of 512; `events` are (block, allocated or freed) in order.
    """
    pools = {True: _Pool(small=True), False: _Pool(small=False)}
    held: dict[int, _Piece] = {}
    reserved = num_segments = 0
    for block, allocated in events:
        size = sizes[block]
        if size == 0:
            continue
        pool = pools[size <= _SMALL]
        if not allocated:
            pool.add(_merge(pool, held.pop(block)))
            continue
        piece = pool.best_fit(size)
        if piece is None:
            num_segments += 1
            piece = _Piece(num_segments, 0, pool.segment_size(size), free=False)
            reserved += piece.size
        else:
            pool.take(piece)
        if pool.splits(piece.size - size):
            rest = _Piece(piece.segment, piece.offset + size, piece.size - size, True, piece, piece.after)
            if piece.after is not None:
                piece.after.before = rest
            piece.size, piece.after = size, rest
            pool.add(rest)
        held[block] = piece
    return reserved
