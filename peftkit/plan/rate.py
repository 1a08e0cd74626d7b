"""The learning rate of a plan: as given, or a usual one that short forks may correct before the first step.

Forks pay only where the run is long: their cost is a number of steps, not a share (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftkit.methods import Method
from peftkit.methods.base import RunSize
from peftkit.plan.advice import WARNING
from peftkit.plan.decisions import DecisionLog
from peftkit.plan.facts import Facts
from peftkit.plan.plan import Decision, Plan, RateSearch
from peftkit.plan.schedule import SCHEDULE_FREE

SEARCH_SHARE = 0.05  # of the run's compute, within diagnose.bounds.compute
_MIN_DOCUMENTS = 10  # as diagnose.statistics has it, which needs numpy
JUDGING_ROWS = 16  # few: the arms are paired
EVAL_COST = 1 / 3  # of a token that is trained on: no backward
# (steps of a fork, forks at least): the longest that the budget pays for. Only the first is exact enough to overrule
# a usual rate that is nearly right.
_FORKS = ((12, 4), (6, 4), (4, 3))
_MAX_FORKS = 8  # a usual rate that is wrong by 8 takes at most seven
_ODD_RATE_FACTOR = 20  # from the usual rate; ten times less still is tried on purpose


def decide_learning_rate(d: DecisionLog, facts: Facts, method: Method, size: RunSize) -> float:
    """Return the learning rate to plan with, and warn of one that nobody would choose."""
    usual, reason = method.learning_rate(d.loaded.recipe.method, facts.model.shape, size)
    usual = float(f"{usual:.3g}")
    rate = float(d.record("train.learning_rate", d.loaded.recipe.train.learning_rate, usual, reason))
    if rate > _ODD_RATE_FACTOR * usual or rate < usual / _ODD_RATE_FACTOR / 10:
        outcome = "the loss is likely to diverge" if rate > usual else "hardly anything is learned"
        text = f"{rate / usual:.2g} times the usual {usual:g}: {outcome}"
        d.made.append(Decision(f"{WARNING}learning_rate", rate, "decided", text))
    return rate


def with_found_rate(plan: Plan, rate: float, reason: str) -> Plan:
    """Return the plan with a learning rate that was found, in its decisions too."""
    decisions = tuple(
        Decision(one.key, rate, "decided", reason) if one.key == "train.learning_rate" else one
        for one in plan.decisions
    )
    return replace(plan, train=replace(plan.train, learning_rate=rate, rate_search=None), decisions=decisions)


def plan_rate_search(
    d: DecisionLog, facts: Facts, method: Method, *, usual: float, size: RunSize, autocast: str | None
) -> RateSearch | None:
    """Plan the forks that correct the usual rate; None, with the reason, where there are none to be made."""
    num_steps, batch_size = size.num_steps, size.batch_size
    if d.loaded.recipe.train.learning_rate != "auto" or num_steps is None or facts.data is None:
        return None
    obstacle = next(_obstacles(d, facts, method, autocast), "")
    budget = min(SEARCH_SHARE, float(d.loaded.recipe.diagnose.bounds.compute)) * num_steps
    judging = EVAL_COST * min(JUDGING_ROWS, facts.data.num_eval) / batch_size  # in steps: once, and for each fork
    affordable = [(steps, int((budget - judging) / (steps + judging)), least) for steps, least in _FORKS]
    kind = next(((steps, min(num, _MAX_FORKS)) for steps, num, least in affordable if num >= least), None)
    if kind is None and not obstacle:
        obstacle = f"forks cost more than {budget:.0f} of the {num_steps} steps, which is what they may take"
    if kind is None or obstacle:
        d.decide("train.rate_search", "none", f"the usual rate as it is: {obstacle}")
        return None
    share = f"{budget / num_steps:.0%} of the run"
    reason = f"the rate is measured before the first step, by forks that take at most {share}"
    d.decide("train.rate_search", f"up to {kind[1]} x {kind[0]} steps", reason)
    return RateSearch(*kind, usual, is_exact=kind[0] == _FORKS[0][0])


def _obstacles(d: DecisionLog, facts: Facts, method: Method, autocast: str | None) -> Iterator[str]:
    """Yield why forks cannot be made, or would say nothing."""
    if method.trains_base:
        yield "whole models are not copied for forks"
    if d.loaded.recipe.train.optimizer == SCHEDULE_FREE:
        yield f"forks judge a rate that falls, and that of {SCHEDULE_FREE} does not"
    if method.schedule is not None:
        yield f"the ranks of {method.name} follow a schedule that a fork is too short for"
    if autocast == "fp16":
        yield "forks under fp16 have no loss scale"
    if facts.data is not None and facts.data.num_eval < _MIN_DOCUMENTS:
        yield f"fewer than {_MIN_DOCUMENTS} held-out rows to judge by"
    if not d.loaded.recipe.diagnose.bounds.compute:
        yield "diagnose.bounds.compute is 0"
