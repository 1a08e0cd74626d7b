"""Paired statistics of evaluation losses: rows of one document are drawn together, gains carry intervals.

The bootstrap is that of Efron over clusters; pairing removes what is alike in both states, which on real runs
leaves a tenth of the noise (Miller 2024, "Adding Error Bars to Evals").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 2000
LEVEL = 0.95
FEWEST = 10  # documents; of fewer no interval is trusted to decide
MOST_JUDGED = 1000  # held-out rows whose losses are kept one by one
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Summed losses of held-out rows, in nats, with what each learns and the document that it is from."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]
    documents: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per learnt token."""
        return sum(self.sums) / sum(self.counts)

    def of(self, numbers: Sequence[int]) -> Rows:
        """Some of the rows."""
        return Rows(
            tuple(self.sums[i] for i in numbers),
            tuple(self.counts[i] for i in numbers),
            tuple(self.documents[i] for i in numbers),
        )


@dataclass(frozen=True)
class Interval:
    """A mean in nats per learnt token with its bounds; `num_documents` were drawn from."""

    mean: float
    low: float
    high: float
    num_documents: int

    @property
    def plain(self) -> list[float | None]:
        """Mean and bounds as JSON has them: it knows no infinity."""
        return [x if math.isfinite(x) else None for x in (self.mean, self.low, self.high)]

    @property
    def is_enough(self) -> bool:
        """Whether there are documents enough to decide by."""
        return self.num_documents >= FEWEST

    @property
    def error(self) -> float:
        """Half the width, as a standard error of the 95 % level."""
        return (self.high - self.low) / (2 * 1.96)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def mean_interval(rows: Rows, *, looks: int = 1) -> Interval:
    """The mean loss with its interval. With `looks` the level is that of each of so many (Bonferroni)."""
    return _interval(np.asarray(rows.sums), rows, looks)


def gain(before: Rows, after: Rows, *, looks: int = 1) -> Interval:
    """How much lower the loss is after than before, row by row. Raises ValueError for other rows."""
    if before.counts != after.counts or before.documents != after.documents:
        raise ValueError("gains are of the same rows")
    return _interval(np.asarray(before.sums) - np.asarray(after.sums), before, looks)


def _interval(sums: Floats, rows: Rows, looks: int) -> Interval:
    """Bootstrap over documents of a ratio of sums. One document alone has no interval: it is infinite."""
    documents, place = np.unique(np.asarray(rows.documents), return_inverse=True)
    by_document = np.bincount(place, weights=sums, minlength=len(documents))
    counts = np.bincount(place, weights=np.asarray(rows.counts, dtype=float), minlength=len(documents))
    mean = float(by_document.sum() / counts.sum())
    if len(documents) < 2:
        return Interval(mean, -np.inf, np.inf, len(documents))
    chance = np.random.default_rng(0)
    weights = chance.multinomial(len(documents), np.full(len(documents), 1 / len(documents)), size=DRAWS)
    means = (weights @ by_document) / np.maximum(weights @ counts, 1e-12)
    tail = (1 - LEVEL) / looks / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    wider = _wider(len(documents))
    return Interval(
        mean, mean - wider * (mean - float(low)), mean + wider * (float(high) - mean), len(documents)
    )


def judged(num_rows: int) -> list[int]:
    """The numbers of the rows whose losses are kept: all, or so many evenly spread."""
    if num_rows <= MOST_JUDGED:
        return list(range(num_rows))
    return [int(i) for i in np.linspace(0, num_rows - 1, MOST_JUDGED)]


def _wider(num: int) -> float:
    """By what the percentile bootstrap of few documents is too narrow: Student's t beside the normal.

    The quantile of t is that of Abramowitz and Stegun (1964), 26.7.5.
    """
    z, free = 1.96, num - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(t / z * np.sqrt(num / free))


def proportion(share: float, num: int) -> Interval:
    """A share of `num` answers with Wilson's interval (1927), which holds near 0 and 1 as well."""
    z, n = 1.96, max(1, num)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, float(middle - half), float(middle + half), num)


def split(documents: Sequence[int]) -> tuple[list[int], list[int]]:
    """(rows to decide by, rows to report by): half of the documents each, whatever their order."""
    names = sorted(set(documents))
    chosen = set(np.random.default_rng(1).permutation(names)[: -(-len(names) // 2)].tolist())
    deciding = [i for i, name in enumerate(documents) if name in chosen]
    reporting = [i for i, name in enumerate(documents) if name not in chosen]
    return deciding, reporting
