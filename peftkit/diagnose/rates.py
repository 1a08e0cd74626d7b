"""The learning rate of a run from short forks of its start: which to try next, and what they say.

Short decayed forks favour high rates, as the best rate falls with the number of steps; one power law corrects it
(docs/quality.md has the measurements).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peftkit.diagnose.statistics import HeldOutLosses, paired_gain, resample_means

STEPS_EXPONENT = 0.17  # best rate of N steps = best rate of n steps * (n / N)^0.17
_ROUND_DOWN = 0.9  # twice too high costs more than twice too low
_FALLBACK = 8.0  # so many times lower rates are tried once where none did any good
_MIN_CERTAINTY = 2.0  # paired standard errors between the best arm and the worst
_NEARLY_RIGHT = 2.0  # within this factor short forks know little more than the usual rate


@dataclass(frozen=True)
class RateArm:
    """A fork at a learning rate, with its held-out losses; None where they were not finite."""

    rate: float
    rows: HeldOutLosses | None


@dataclass(frozen=True)
class RateChoice:
    """A learning rate with its reason, and the interval of the forks where they chose it."""

    rate: float
    said: str
    interval: tuple[float, float] | None = None
    warns: bool = False


def next_rate(arms: Sequence[RateArm], start: HeldOutLosses, *, usual: float, max_forks: int) -> float | None:
    """Return the rate of the next fork; None where the forks suffice, or as many were made as may be.

    The usual rate, half and twice as much; then outward by factors of two while the best is at an edge. Where none
    of them is better than the start, the same once more eight times lower.
    """
    rates = [arm.rate for arm in arms]
    centre = usual
    if len(arms) >= 3 and not any(_does_good(arm, start) for arm in arms):
        centre = usual / _FALLBACK
    for rate in (centre, centre / 2, centre * 2):
        if rate not in rates:
            return rate if len(arms) < max_forks else None
    if len(arms) >= max_forks:
        return None
    useful = [arm for arm in arms if _does_good(arm, start)]
    if not useful or _is_flat(useful):
        return None
    best = min(useful, key=lambda arm: _loss(arm, start))
    for factor in (2.0, 0.5):
        if best.rate * factor not in rates:
            return best.rate * factor
    return None


def choose_rate(
    arms: Sequence[RateArm], start: HeldOutLosses, *, usual: float, fork_steps: int, num_steps: int, is_exact: bool
) -> RateChoice:
    """Return the rate that the forks name for a run of `num_steps`, or the usual one where they name none.

    It is the vertex of the parabola through the best fork and its neighbours in (log rate, loss), corrected to the
    run's length, and rounded down.
    """
    useful = [arm for arm in arms if _does_good(arm, start)]
    if not useful:
        said = "no fork was better than the start, at any rate: look at the rows (peftkit check)"
        return RateChoice(usual, said, warns=True)
    if _is_flat(useful):
        return RateChoice(usual, "the forks do not tell rates apart: the usual one")
    means = np.asarray([_loss(arm, start) for arm in arms])
    correction = _ROUND_DOWN * math.pow(fork_steps / num_steps, STEPS_EXPONENT)
    rates = [arm.rate for arm in arms]
    vertex = _vertex(rates, means) * correction
    finite = [arm.rows if arm.rows is not None else start for arm in arms]
    capped = np.minimum(resample_means(finite), resample_means([start]))
    vertices = sorted(_vertex(rates, resampled) * correction for resampled in capped)
    low, high = vertices[int(0.025 * len(vertices))], vertices[int(0.975 * len(vertices)) - 1]
    losses = {arm.rate: "not finite" if arm.rows is None else f"{arm.rows.mean:.3f}" for arm in arms}
    tried = ", ".join(f"{rate:.2g}: {losses[rate]}" for rate in sorted(losses))
    evidence = f"forks of {fork_steps} steps from the start ({tried}), for {num_steps} steps"
    said = f"{evidence}: {vertex:.3g} [{low:.2g}, {high:.2g}]; the usual rate is {usual:g}"
    if not is_exact and max(vertex / usual, usual / vertex) <= _NEARLY_RIGHT:
        return RateChoice(float(f"{math.sqrt(vertex * usual):.3g}"), f"{said}, near enough: the middle", (low, high))
    return RateChoice(float(f"{vertex:.3g}"), said, (low, high))


def _does_good(arm: RateArm, start: HeldOutLosses) -> bool:
    return arm.rows is not None and arm.rows.mean < start.mean


def _loss(arm: RateArm, start: HeldOutLosses) -> float:
    """Return the loss of an arm; one that did harm counts as one that did nothing, however much it did."""
    return start.mean if arm.rows is None else min(arm.rows.mean, start.mean)


def _is_flat(arms: Sequence[RateArm]) -> bool:
    """Return whether the best of several arms is no better than the worst beyond paired noise."""
    rows = sorted((arm.rows for arm in arms if arm.rows is not None), key=lambda one: one.mean)
    gain = paired_gain(rows[-1], rows[0])
    return len(rows) > 1 and not gain.mean > _MIN_CERTAINTY * gain.error


def _vertex(rates: Sequence[float], losses: np.ndarray) -> float:
    """Return the rate at the minimum of the parabola through the best rate and its neighbours, a factor of 2 away.

    With losses a, b, c at log2 rates -1, 0, 1 it is at (a - c) / (2 (a - 2 b + c)). At an edge, half of the best rate:
    it is not known to be the best, and too high costs most.
    """
    best = int(np.argmin(losses))
    loss_of = dict(zip(rates, losses.tolist(), strict=True))
    below, above = loss_of.get(rates[best] / 2), loss_of.get(rates[best] * 2)
    if below is None or above is None:
        return rates[best] / 2
    curvature = below - 2 * float(losses[best]) + above
    return rates[best] * math.pow(2, (below - above) / (2 * curvature)) if curvature > 0 else rates[best]
