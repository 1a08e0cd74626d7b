"""Does quality lag: against a target or a reference, or else has it stopped moving?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peftkit.diagnose.statistics import Interval, Rows, gain, mean_interval

State = Literal["not lagging", "lagging", "plateaued", "still improving"]
MARGIN = 0.01  # of the loss: what a gain has to be to matter
EXTENSION = 0.5  # of the run: what "more steps" means
_EARLY = 0.45  # of the learning: from here on the trend is looked at


@dataclass(frozen=True)
class Evaluation:
    """The held-out rows at a step, and how much was learnt by then: the sum of the learning rates so far."""

    step: int
    learnt: float
    rows: Rows


@dataclass(frozen=True)
class Quality:
    """The state with its numbers. `projected` is what half as many steps again would gain, in nats."""

    state: State
    loss: Interval
    target: float | None
    margin: float
    projected: Interval | None
    worsened: Interval | None  # from the best evaluation to the last, where that is worse
    said: str


def judge(
    evaluations: Sequence[Evaluation],
    *,
    target: float | None,
    behind: Interval | None = None,
    scored: Interval | None = None,
    looks: int = 1,
) -> Quality:
    """The state of a run's quality by its evaluations, the last of which is judged.

    `behind` is how much better a reference was, `scored` the metric that the target is of, where it is not
    the loss.

    A loss is a straight line over the logarithm of what was learnt, as far as this needs it; the sum of the
    learning rates stands for the steps, so that a decaying rate is not taken for a plateau.
    """
    last = evaluations[-1]
    best = min(evaluations, key=lambda one: one.rows.mean)
    # a target is for what is published, which is the best
    loss = mean_interval((last if target is None else best).rows, looks=looks)
    margin = MARGIN * loss.mean
    projected = _projected(evaluations, looks)
    worsened = gain(last.rows, best.rows, looks=looks) if best.step < last.step else None
    if worsened is not None and worsened.low <= 0:
        worsened = None
    state, said = _state(loss, target, scored, behind, projected, margin)
    return Quality(state, loss, target, margin, projected, worsened, said)


def _state(
    loss: Interval,
    target: float | None,
    scored: Interval | None,
    behind: Interval | None,
    projected: Interval | None,
    margin: float,
) -> tuple[State, str]:
    if target is not None:
        return _against_target(loss, target, scored)
    if behind is not None:
        if behind.low > 0 and behind.mean > margin:
            return "lagging", f"training the weights themselves is better by {behind}"
        said = f"training the weights themselves is better by {behind}, which is within the margin"
        return "not lagging", said
    if projected is None:
        return (
            "still improving",
            "one evaluation cannot tell a climb from a plateau: set train.eval_steps lower",
        )
    if projected.low > 0 and projected.mean > margin:
        return "still improving", f"half as many steps again would bring about {projected}"
    return "plateaued", "the loss has stopped falling beyond its noise"


def _against_target(loss: Interval, target: float, scored: Interval | None) -> tuple[State, str]:
    """Whether a target is missed beyond noise."""
    if scored is not None:
        said = f"{scored.mean:.3f} [{scored.low:.3f}, {scored.high:.3f}] of answers are right, of {target:g}"
        return ("lagging" if scored.high < target else "not lagging"), said
    if loss.low > target:
        return "lagging", f"the loss, {loss.mean:.4f}, is above the target of {target:g}"
    if loss.mean > target:
        noise = f"which {loss.num_documents} documents cannot tell from noise"
        return "not lagging", f"the loss, {loss.mean:.4f}, is above the target of {target:g}, {noise}"
    return "not lagging", f"the loss, {loss.mean:.4f}, reaches the target of {target:g}"


def _projected(evaluations: Sequence[Evaluation], looks: int) -> Interval | None:
    """What half as much learning again would gain, by the slope of the later part."""
    last = evaluations[-1]
    earlier = [one for one in evaluations[:-1] if 0 < one.learnt < last.learnt]
    if not earlier:
        return None
    first = min(earlier, key=lambda one: abs(one.learnt - _EARLY * last.learnt))
    seen = gain(first.rows, last.rows, looks=looks)
    scale = math.log(1 + EXTENSION) / math.log(last.learnt / first.learnt)
    return Interval(seen.mean * scale, seen.low * scale, seen.high * scale, seen.num_documents)
