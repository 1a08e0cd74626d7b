"""Documents laid together in rows of a fixed room, so that hardly anything is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

Packs = list[list[int]]


def pack(lengths: Sequence[int], room: int) -> Packs:
    """The numbers of the rows that lie together: best-fit decreasing, the same for the same lengths.

    The longest row comes first, and each goes where it leaves the least room (Johnson 1973: at most 11/9 of
    the fewest packs there can be, and one more). Each pack keeps the order of the rows. Raises ValueError for
    rows that are longer than `room`.
    """
    too_long = [row for row, length in enumerate(lengths) if length > room]
    if too_long:
        raise ValueError(f"rows longer than the room of {room}: {too_long[:5]}")
    packs: Packs = []
    left: list[int] = []  # rooms that some pack has left, in order
    having: dict[int, list[int]] = {}  # a room that is left -> the packs that have it
    for row in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(left, lengths[row])
        if at == len(left):
            number, rest = len(packs), room
            packs.append([])
        else:
            rest = left[at]
            number = having[rest].pop()
            if not having[rest]:
                del having[rest], left[at]
        packs[number].append(row)
        rest -= lengths[row]
        if rest and rest not in having:
            having[rest] = []
            insort(left, rest)
        if rest:
            having[rest].append(number)
    return sorted(sorted(rows) for rows in packs)


def efficiency(lengths: Sequence[int], packs: Packs, room: int) -> float:
    """The share of the packs' room that holds tokens; 1 where there are no packs."""
    return sum(lengths[row] for rows in packs for row in rows) / (room * len(packs)) if packs else 1.0
