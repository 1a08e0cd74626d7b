"""Packing: several documents in one row of a fixed number of tokens, so that hardly anything is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

PackedRows = list[list[int]]


def pack_rows(lengths: Sequence[int], room: int) -> PackedRows:
    """Pack rows into as few packs of `room` tokens as best-fit decreasing finds. Returns row numbers by pack.

    The longest row comes first, and each goes where it leaves the least room (Johnson 1973: at most 11/9 of
    the fewest packs there can be, and one more). Deterministic; each pack keeps the order of the rows. Raises
    ValueError for rows that are longer than `room`.

    pack_rows([3, 7, 5, 4], 8) -> [[0, 2], [1], [3]]
    """
    too_long = [row for row, length in enumerate(lengths) if length > room]
    if too_long:
        raise ValueError(f"rows longer than a pack of {room} tokens: {too_long[:5]}")
    packs: PackedRows = []
    free_sizes: list[int] = []  # rooms that some pack has left, in order
    packs_by_free_size: dict[int, list[int]] = {}  # a room that is left -> the packs that have it
    for row in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        index = bisect_left(free_sizes, lengths[row])
        if index == len(free_sizes):
            pack_number, free = len(packs), room
            packs.append([])
        else:
            free = free_sizes[index]
            pack_number = packs_by_free_size[free].pop()
            if not packs_by_free_size[free]:
                del packs_by_free_size[free], free_sizes[index]
        packs[pack_number].append(row)
        free -= lengths[row]
        if free and free not in packs_by_free_size:
            packs_by_free_size[free] = []
            insort(free_sizes, free)
        if free:
            packs_by_free_size[free].append(pack_number)
    return sorted(sorted(rows) for rows in packs)


def packing_efficiency(lengths: Sequence[int], packs: PackedRows, room: int) -> float:
    """Compute the share of the packs' room that holds tokens; 1 where there are no packs."""
    return sum(lengths[row] for rows in packs for row in rows) / (room * len(packs)) if packs else 1.0
