"""The learning-rate schedule of a plan: its warm-up in steps, and transformers' arguments."""

from __future__ import annotations

import math

from peftkit.plan.decisions import DecisionLog


def resolve_schedule(d: DecisionLog, steps: int | None) -> tuple[int, dict[str, float]]:
    """Return (steps of warm-up, arguments of transformers' schedule) for `steps` in all, None where unknown.

    Refuses what does not fit into the run: transformers would train on at rates that nobody asked for.
    """
    schedule = d.loaded.recipe.train.schedule
    d.record("train.schedule.kind", schedule.kind)
    if schedule.warmup_steps is None:
        num_warmup = math.ceil((steps or 0) * d.record("train.schedule.warmup", schedule.warmup))
    else:
        num_warmup = d.record("train.schedule.warmup_steps", schedule.warmup_steps)
        if steps is not None and num_warmup >= steps:
            d.refuse("train.schedule.warmup_steps", f"{num_warmup} of {steps} steps", f"at most {steps - 1}")
    # the first step of a warm-up has rate 0, so a single step must have none
    num_warmup = min(num_warmup, max(0, (steps or 0) - 1))
    arguments: dict[str, float] = {}
    if schedule.kind == "restarts":
        cycles = arguments["num_cycles"] = d.record("train.schedule.cycles", schedule.cycles)
        if steps is not None and cycles > max(1, (steps - num_warmup) // 2):
            got = f"{cycles} in {steps - num_warmup} steps after the warm-up"
            d.refuse("train.schedule.cycles", got, f"at most {max(1, (steps - num_warmup) // 2)}: two steps each")
    if schedule.kind == "wsd":
        decay = d.record("train.schedule.decay", schedule.decay)
        num_decay = arguments["num_decay_steps"] = max(1, math.ceil((steps or 0) * decay))
        if steps is not None and num_warmup + num_decay > steps:
            got = f"{num_warmup} steps of warm-up and {num_decay} of decay in {steps} steps"
            most = math.floor(100 * (steps - num_warmup) / steps) / 100
            d.refuse("train.schedule.decay", got, f"at most {most:g} beside that warm-up")
    if schedule.kind in {"cosine", "wsd"} and d.record("train.schedule.min_rate", schedule.min_rate):
        arguments["min_lr_rate" if schedule.kind == "cosine" else "min_lr_ratio"] = schedule.min_rate
    return num_warmup, arguments
