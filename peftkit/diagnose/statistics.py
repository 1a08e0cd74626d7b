"""Paired statistics of evaluation losses: bootstrap over documents, gains with intervals.

The bootstrap is Efron's over clusters; pairing removes what both states have in common, which on real runs
leaves a tenth of the noise (Miller 2024, "Adding Error Bars to Evals").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_DOCUMENTS = 10  # documents; of fewer no interval is trusted to decide
MAX_RECORDED_ROWS = 1000  # held-out rows whose losses are kept one by one
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HeldOutLosses:
    """Summed losses of held-out rows, in nats, with their loss tokens and the document each is from."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]
    documents: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per trained token."""
        return sum(self.sums) / sum(self.counts)

    def of(self, indices: Sequence[int]) -> HeldOutLosses:
        """Return the losses of the rows at `indices`."""
        return HeldOutLosses(
            tuple(self.sums[i] for i in indices),
            tuple(self.counts[i] for i in indices),
            tuple(self.documents[i] for i in indices),
        )


@dataclass(frozen=True)
class Interval:
    """A mean in nats per trained token with its bounds; `num_documents` is the size of the bootstrap."""

    mean: float
    low: float
    high: float
    num_documents: int

    @property
    def json_values(self) -> list[float | None]:
        """Mean and bounds for JSON, which has no infinity: None instead."""
        return [x if math.isfinite(x) else None for x in (self.mean, self.low, self.high)]

    @property
    def has_enough_documents(self) -> bool:
        """True if there are enough documents to decide by."""
        return self.num_documents >= MIN_DOCUMENTS

    @property
    def error(self) -> float:
        """Half the width as a standard error, at the 95 % level."""
        return (self.high - self.low) / (2 * 1.96)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def mean_interval(rows: HeldOutLosses, *, looks: int = 1) -> Interval:
    """Return the mean loss with its interval. `looks` divides the error level (Bonferroni)."""
    return _bootstrap_interval(np.asarray(rows.sums), rows, looks)


def paired_gain(before: HeldOutLosses, after: HeldOutLosses, *, looks: int = 1) -> Interval:
    """Return how much lower the loss is after than before, row by row. Raises ValueError for other rows."""
    if before.counts != after.counts or before.documents != after.documents:
        raise ValueError("gains are of the same rows")
    return _bootstrap_interval(np.asarray(before.sums) - np.asarray(after.sums), before, looks)


def resample_means(arms: Sequence[HeldOutLosses]) -> Floats:
    """Return the mean losses of arms over resampled documents, shape (NUM_RESAMPLES, arms): the same for all arms."""
    documents, place = np.unique(np.asarray(arms[0].documents), return_inverse=True)
    num = len(documents)
    weights = np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)
    counts = np.bincount(place, weights=np.asarray(arms[0].counts, dtype=float), minlength=num)
    sums = np.stack([np.bincount(place, weights=np.asarray(arm.sums), minlength=num) for arm in arms], axis=1)
    means: Floats = (weights @ sums) / np.maximum(weights @ counts, 1e-12)[:, None]
    return means


def _bootstrap_interval(sums: Floats, rows: HeldOutLosses, looks: int) -> Interval:
    """Bootstrap the ratio sum(sums) / sum(counts) over documents; infinite bounds for one document.

    weights ~ Multinomial(n, 1/n), shape (NUM_RESAMPLES, n);  means = weights @ sums / weights @ counts
    bounds = mean + f * (quantile(means, [a, 1 - a]) - mean),  a = (1 - CONFIDENCE) / looks / 2

    n is the number of documents, whose rows are drawn together; f corrects for few of them.

    Example: sums (4, 2, 6), counts (2, 2, 2), documents (0, 0, 1): per document sums (6, 6) and counts
    (4, 2); mean = 12 / 6 = 2.0; resamples give 1.5, 2.0 or 3.0.
    """
    documents, place = np.unique(np.asarray(rows.documents), return_inverse=True)
    by_document = np.bincount(place, weights=sums, minlength=len(documents))
    counts = np.bincount(place, weights=np.asarray(rows.counts, dtype=float), minlength=len(documents))
    mean = float(by_document.sum() / counts.sum())
    if len(documents) < 2:
        return Interval(mean, -np.inf, np.inf, len(documents))
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(documents), np.full(len(documents), 1 / len(documents)), size=NUM_RESAMPLES)
    means = (weights @ by_document) / np.maximum(weights @ counts, 1e-12)
    tail = (1 - CONFIDENCE) / looks / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    # the percentile bootstrap of few documents is too narrow by sqrt(n / (n - 1)) and by t / z (Hesterberg 2015)
    num = len(documents)
    z, free = 1.96, num - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    factor = float(t / z * np.sqrt(num / free))
    return Interval(mean, mean - factor * (mean - float(low)), mean + factor * (float(high) - mean), len(documents))


def recorded_rows(num_rows: int) -> list[int]:
    """Return the indices of the rows whose losses are recorded: all, or MAX_RECORDED_ROWS evenly spread."""
    if num_rows <= MAX_RECORDED_ROWS:
        return list(range(num_rows))
    return [int(i) for i in np.linspace(0, num_rows - 1, MAX_RECORDED_ROWS)]


def wilson_interval(share: float, num: int) -> Interval:
    """Return a share of `num` answers with Wilson's interval (1927), valid near 0 and 1 as well."""
    z, n = 1.96, max(1, num)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, float(middle - half), float(middle + half), num)


def split_documents(documents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split into (deciding, reporting) row indices: half of the documents each, at random by a fixed seed."""
    names = sorted(set(documents))
    deciding_documents = set(np.random.default_rng(1).permutation(names)[: -(-len(names) // 2)].tolist())
    deciding = [i for i, name in enumerate(documents) if name in deciding_documents]
    reporting = [i for i, name in enumerate(documents) if name not in deciding_documents]
    return deciding, reporting
