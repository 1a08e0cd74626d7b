"""The held-out split: a share of the rows by seed, so that no near duplicates are on both sides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence

_MAX_ROUNDS = 5
_MAX_EXCESS = 1.5  # times the share: a unit that is larger is left for training


def hold_out_share(units: Sequence[Hashable], share: float, seed: int) -> set[int]:
    """Return the numbers of the rows to hold out.

    Rows of one unit stay on one side; of two units one is held out.

    Units are taken in an order that the seed decides, until the share is reached; one that would exceed it by
    far is left for training.
    """
    counts = Counter(units)
    keys = sorted(counts, key=str)
    random.Random(seed).shuffle(keys)
    target = max(1, round(len(units) * share)) if len(keys) > 1 and share > 0 else 0
    held_out_units: set[Hashable] = set()
    count = 0
    for key in keys if target else ():
        if count >= target:
            break
        if count + counts[key] <= min(_MAX_EXCESS * target, len(units) - 1):
            held_out_units.add(key)
            count += counts[key]
    if target and not held_out_units:
        held_out_units.add(min(keys, key=lambda key: counts[key]))  # every unit is larger than the share
    return {number for number, unit in enumerate(units) if unit in held_out_units}


def without_near_duplicates(
    texts: Sequence[str], units: Sequence[Hashable], held_out: set[int]
) -> tuple[set[int], int]:
    """Move held-out rows that a training row nearly repeats back to training.

    Returns (rows to hold out, number of rows moved). A unit moves as a whole. Where nothing would be left the
    split stays as it was.
    """
    from peftkit.data.rows.similar import common_shingles, find_near_duplicates, match_near_duplicates

    common = common_shingles(texts)
    remaining = set(held_out)
    new_train_rows = [number for number in range(len(texts)) if number not in held_out]
    for _ in range(_MAX_ROUNDS):
        numbers = sorted(remaining)
        matches = match_near_duplicates([texts[n] for n in numbers], (texts[n] for n in new_train_rows), common)
        returning_units = {units[numbers[index]] for index in matches}
        if not returning_units:
            break
        for index, earlier, _ in find_near_duplicates([texts[n] for n in numbers]):
            pair = {units[numbers[index]], units[numbers[earlier]]}
            if pair & returning_units:
                returning_units |= pair
        new_train_rows = [number for number in numbers if units[number] in returning_units]
        remaining.difference_update(new_train_rows)
    if not remaining:
        return held_out, 0
    return remaining, len(held_out) - len(remaining)
