"""Loss by position: how far the base's positions reach, where config.json claims more. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from peftkit.diagnose.statistics import HeldOutLosses, Interval, mean_interval

NUM_SPANS = 8
MAX_STRETCH = 32  # YaRN was tried up to this (Peng et al. 2023)
_MIN_RISE_SHARE = 0.05  # of the loss before it: text gets easier with its context, where positions were trained


@dataclass(frozen=True)
class SpanLosses:
    """The held-out losses of the tokens at positions from `start` up to `end`, without `end`."""

    start: int
    end: int
    rows: HeldOutLosses


@dataclass(frozen=True)
class Stretch:
    """A base that loses beyond position `reach`, and what stretching its rotary positions by `factor` gains at once.

    `longest` is the longest row of all, with virtual tokens. `reach` is None where the loss never rises, or where no
    stretch is large enough; `gain` is per token of the rows that are longer than the reach.
    """

    reach: int | None = None
    longest: int = 0
    factor: int = 1
    gain: Interval | None = None
    losses: tuple[tuple[int, int, float, float], ...] = ()  # start, end, loss as it is, loss stretched

    @property
    def said(self) -> str:
        """What was measured, in words."""
        before = min(loss for start, _, loss, _ in self.losses if start < (self.reach or 0))
        last = self.losses[-1]
        rise = f"the loss rises from {before:.3f} to {last[2]:.3f} from position {self.reach} on"
        return f"{rise}: the base was trained to no more; stretched {self.factor} times, it is {last[3]:.3f} there"


def equal_spans(longest: int) -> list[tuple[int, int]]:
    """Return NUM_SPANS spans of positions, [start, end), of equal length up to the longest row."""
    edges = [round(longest * number / NUM_SPANS) for number in range(NUM_SPANS + 1)]
    return [(start, end) for start, end in pairwise(edges) if end > start]


def find_reaches(spans: Sequence[SpanLosses]) -> list[int]:
    """Return where the base's positions may end: from where the loss has risen, and the end of the lowest span before.

    A rise is in the same rows, by 5 % of the loss and beyond noise. Empty where there is none.
    """
    best: SpanLosses | None = None
    for span in spans:
        if not any(span.rows.counts):
            continue
        if best is not None:
            both = [i for i, counts in enumerate(zip(best.rows.counts, span.rows.counts, strict=True)) if all(counts)]
            rises = tuple(span.rows.of([i]).mean - best.rows.of([i]).mean for i in both)
            documents = tuple(span.rows.documents[i] for i in both)
            if not both:
                continue
            rise = mean_interval(HeldOutLosses(rises, (1,) * len(both), documents))
            if rise.has_enough_documents and rise.low > 0 and rise.mean > _MIN_RISE_SHARE * best.rows.mean:
                return sorted({best.end, span.start})
        if best is None or span.rows.mean < best.rows.mean:
            best = span
    return []


def stretch_factor(longest: int, reach: int) -> int | None:
    """Return the factor by which positions up to `longest` come to lie within the reach; None beyond MAX_STRETCH."""
    factor = max(2, math.ceil(longest / reach))
    return factor if factor <= MAX_STRETCH else None
