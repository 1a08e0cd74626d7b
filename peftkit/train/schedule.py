"""Restarted learning-rate schedule, for a run that continues past its planned end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LambdaLR

from peftkit.plan import Plan

if TYPE_CHECKING:
    from torch.optim import Optimizer

_WARMUP_SHARE = 0.05  # of the steps that are left: new directions are not trusted at once


def restart_rate_factor(plan: Plan, step: int) -> float:
    """Return the share of the peak learning rate at a step, from the restart.

    With n steps left, w = max(1, 5 % of n), s = step - restart_step: s / w during warm-up, then in
    (s - w) / (n - w) linear to 0, constant, or else cosine to the plan's minimum.
    """
    train = plan.train
    num_steps = (train.num_steps or 0) - train.restart_step
    num_warmup = max(1, math.ceil(_WARMUP_SHARE * num_steps))
    position = max(0, step - train.restart_step)
    if position < num_warmup:
        return position / num_warmup
    progress = min(1.0, (position - num_warmup) / max(1, num_steps - num_warmup))
    low = max(train.schedule_arguments.get(name, 0.0) for name in ("min_lr_rate", "min_lr_ratio"))
    cosine = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))  # also of wsd and restarts: few steps are left
    return {"linear": 1.0 - progress, "constant": 1.0}.get(train.schedule, cosine)


def build_restart_scheduler(plan: Plan, optimizer: Optimizer) -> LambdaLR:
    """Build the restarted schedule as a torch LambdaLR."""
    return LambdaLR(optimizer, lambda step: restart_rate_factor(plan, step))
