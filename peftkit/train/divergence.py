"""A training that leaves the road: as an error, and in words."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.errors import PeftkitError, Problem
from peftkit.plan import Plan

ADVICE = "lower the learning rate, warm up for 5-10 % of the steps, clip at 1.0, or look at these rows"


class Diverged(PeftkitError):
    """Training left the road at `first_step`, and the recipe says to go back and try more gently."""

    def __init__(self, message: str, *, first_step: int) -> None:
        self.first_step = first_step
        super().__init__(message)


def divergence(plan: Plan, said: str, rows: Sequence[str]) -> Problem:
    """What the user is told of a training that left the road."""
    where = f"train.learning_rate {plan.train.learning_rate:g}"
    names = f" (rows {', '.join(rows)})" if rows else ""
    return Problem(where, f"{said}{names}", "finite numbers and a loss that falls", ADVICE)
