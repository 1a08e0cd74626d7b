"""The learning rate of a run that goes on past its end: its schedule, begun anew at a step."""

from __future__ import annotations

import math
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from peftkit.plan import Plan

_WARM = 0.05  # of the steps that are left: new directions are not trusted at once


def share(plan: Plan, step: int) -> float:
    """The share of the peak rate at a step, as transformers' schedules have it, counted from the restart."""
    train = plan.train
    whole = (train.num_steps or 0) - train.restart_step
    warm = max(1, math.ceil(_WARM * whole))
    here = max(0, step - train.restart_step)
    if here < warm:
        return here / warm
    done = min(1.0, (here - warm) / max(1, whole - warm))
    return {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1.0 - done,
        "constant": 1.0,
    }[train.schedule]


def restarted(plan: Plan, optimizer: Any) -> LambdaLR:
    """The schedule as torch has it."""
    return LambdaLR(optimizer, lambda step: share(plan, step))
