"""Which rows are held out: a share drawn by the seed, so that nothing alike stands on both sides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence

_ROUNDS = 5
_AT_MOST = 1.5  # times the share: a unit that is larger is left for training


def split_share(units: Sequence[Hashable], share: float, seed: int) -> set[int]:
    """The numbers of the rows to hold out. Rows of one unit stay on one side; of two units one is held out.

    Units are drawn in an order that the seed decides, until the share is reached; one that would exceed it by
    far is left to be learnt.
    """
    counts = Counter(units)
    keys = sorted(counts, key=str)
    random.Random(seed).shuffle(keys)
    wanted = max(1, round(len(units) * share)) if len(keys) > 1 and share > 0 else 0
    held: set[Hashable] = set()
    count = 0
    for key in keys if wanted else ():
        if count >= wanted:
            break
        if count + counts[key] <= min(_AT_MOST * wanted, len(units) - 1):
            held.add(key)
            count += counts[key]
    if wanted and not held:
        held.add(min(keys, key=lambda key: counts[key]))  # every unit is larger than the share
    return {number for number, unit in enumerate(units) if unit in held}


def without_near(texts: Sequence[str], units: Sequence[Hashable], held: set[int]) -> tuple[set[int], int]:
    """(rows to hold out, how many went back to training because a row there nearly repeats them).

    A unit goes back as a whole. Where nothing would be left the split stays as it was.
    """
    from peftkit.data.rows.similar import common_runs, near_duplicates, near_in

    common = common_runs(texts)
    left, arrivals = set(held), [number for number in range(len(texts)) if number not in held]
    for _ in range(_ROUNDS):
        numbers = sorted(left)
        near = near_in([texts[n] for n in numbers], (texts[n] for n in arrivals), common)
        back = {units[numbers[place]] for place in near}
        if not back:
            break
        for place, earlier, _ in near_duplicates([texts[n] for n in numbers]):
            pair = {units[numbers[place]], units[numbers[earlier]]}
            if pair & back:
                back |= pair
        arrivals = [number for number in numbers if units[number] in back]
        left.difference_update(arrivals)
    if not left:
        return held, 0
    return left, len(held) - len(left)
