"""Quality of a run: against a target or a reference, or else by whether the loss still falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peftkit.diagnose.statistics import HeldOutLosses, Interval, mean_interval, paired_gain

State = Literal["not lagging", "lagging", "plateaued", "still improving"]
MARGIN_SHARE = 0.01  # of the loss: what a gain has to be to matter
EXTENSION_SHARE = 0.5  # of the run: what "more steps" means
_TREND_START = 0.45  # of the learning: from here on the trend is looked at


@dataclass(frozen=True)
class EvaluationPoint:
    """The held-out losses at a step, and the sum of the learning rates up to it."""

    step: int
    learnt: float
    rows: HeldOutLosses


@dataclass(frozen=True)
class Quality:
    """The state with its numbers. `projected` is the gain of 50 % more steps, in nats."""

    state: State
    loss: Interval
    target: float | None
    margin: float
    projected: Interval | None
    worsened: Interval | None  # from the best evaluation to the last, where that is worse
    said: str


def assess_quality(
    evaluations: Sequence[EvaluationPoint],
    *,
    target: float | None,
    reference_gain: Interval | None = None,
    metric_interval: Interval | None = None,
    looks: int = 1,
) -> Quality:
    """Judge the quality of a run by its evaluations, the last of which is judged.

    `reference_gain` is how much better a reference was, `metric_interval` the metric of the target, if that
    is not the loss.

    The loss is taken as a power of the training so far, so that no gain exceeds the loss that there is; the
    sum of the learning rates stands for the steps, so that a decaying rate is not taken for a plateau.
    """
    last = evaluations[-1]
    best = min(evaluations, key=lambda one: one.rows.mean)
    # a target is for what is published, which is the best
    loss = mean_interval((last if target is None else best).rows, looks=looks)
    margin = MARGIN_SHARE * loss.mean
    earlier = [evaluation for evaluation in evaluations[:-1] if 0 < evaluation.learnt < last.learnt]
    if not earlier:
        projected = None
    else:
        first = min(earlier, key=lambda point: abs(point.learnt - _TREND_START * last.learnt))
        observed_gain = paired_gain(first.rows, last.rows, looks=looks)
        exponent = math.log(1 + EXTENSION_SHARE) / math.log(last.learnt / first.learnt)
        bounds = (observed_gain.mean, observed_gain.low, observed_gain.high)
        mean, low, high = (_project_gain(gain, last.rows.mean, exponent) for gain in bounds)
        projected = Interval(mean, low, high, observed_gain.num_documents)
    worsened = paired_gain(last.rows, best.rows, looks=looks) if best.step < last.step else None
    if worsened is not None and worsened.low <= 0:
        worsened = None
    state, reason = _state(loss, target, metric_interval, reference_gain, projected, margin)
    return Quality(state, loss, target, margin, projected, worsened, reason)


def _project_gain(gain: float, loss: float, exponent: float) -> float:
    """Return the gain of training on, where the last `gain` led to `loss` and the loss follows a power law.

    loss * (1 - (1 + gain / loss)^-exponent): exponent * gain for small gains, always less than the loss. A loss
    that rises goes on as it did.
    """
    if gain <= 0 or not math.isfinite(gain) or loss <= 0:
        return min(exponent * gain, max(0.0, loss))
    return loss * (1 - math.pow(1 + gain / loss, -exponent))


def _state(
    loss: Interval,
    target: float | None,
    metric_interval: Interval | None,
    reference_gain: Interval | None,
    projected: Interval | None,
    margin: float,
) -> tuple[State, str]:
    if target is not None:
        # whether a target is missed beyond noise
        if metric_interval is not None:
            distance = (
                f"{metric_interval.mean:.3f} [{metric_interval.low:.3f}, {metric_interval.high:.3f}] "
                f"of answers are right; the target is {target:g}"
            )
            return ("lagging" if metric_interval.high < target else "not lagging"), distance
        if loss.low > target:
            return "lagging", f"the loss, {loss.mean:.4f}, is above the target of {target:g}"
        if loss.mean > target:
            noise = f"which {loss.num_documents} documents cannot tell from noise"
            return "not lagging", f"the loss, {loss.mean:.4f}, is above the target of {target:g}, {noise}"
        return "not lagging", f"the loss, {loss.mean:.4f}, reaches the target of {target:g}"
    if reference_gain is not None:
        if reference_gain.low > 0 and reference_gain.mean > margin:
            return "lagging", f"full fine-tuning is better by {reference_gain}"
        reason = f"full fine-tuning is better by {reference_gain}, which is within the margin"
        return "not lagging", reason
    if projected is None:
        return ("still improving", "one evaluation cannot tell progress from a plateau: set train.eval_steps lower")
    if projected.low > 0 and projected.mean > margin:
        return "still improving", f"50 % more steps would lower the loss by about {projected}"
    return "plateaued", "the loss has stopped falling beyond its noise"
