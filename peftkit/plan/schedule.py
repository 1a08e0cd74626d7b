"""The learning-rate schedule of a plan: its warm-up in steps, and transformers' arguments."""

from __future__ import annotations

import math

from peftkit.plan.decisions import DecisionLog

SCHEDULE_FREE = "schedule_free_adamw"  # Defazio et al. 2024: a mean of the weights in place of a falling rate


def resolve_schedule(d: DecisionLog, steps: int | None) -> tuple[str, int, dict[str, float]]:
    """Return (kind, steps of warm-up, arguments of transformers' schedule) for `steps` in all, None where unknown.

    Refuses what does not fit into the run: transformers would train on at rates that nobody asked for.
    """
    schedule = d.loaded.recipe.train.schedule
    kind = schedule.kind
    if d.loaded.recipe.train.optimizer == SCHEDULE_FREE:
        for key, value in (("kind", kind), ("min_rate", schedule.min_rate)):
            if value != "constant" and d.loaded.source(("train", "schedule", key)) is not None:
                got, fix = f"{key} {value} with {SCHEDULE_FREE}", "leave it out: its rate does not fall"
                d.refuse(f"train.schedule.{key}", got, "a constant rate", fix)
        kind = "constant"
        d.decide("train.schedule.kind", kind, "the mean of the weights takes the place of a falling rate")
    else:
        d.record("train.schedule.kind", kind)
    if schedule.warmup_steps is None:
        num_warmup = math.ceil((steps or 0) * d.record("train.schedule.warmup", schedule.warmup))
    else:
        num_warmup = d.record("train.schedule.warmup_steps", schedule.warmup_steps)
        if steps is not None and num_warmup >= steps:
            d.refuse("train.schedule.warmup_steps", f"{num_warmup} of {steps} steps", f"at most {steps - 1}")
    # the first step of a warm-up has rate 0, so a single step must have none
    num_warmup = min(num_warmup, max(0, (steps or 0) - 1))
    arguments: dict[str, float] = {}
    if kind == "restarts":
        cycles = arguments["num_cycles"] = d.record("train.schedule.cycles", schedule.cycles)
        if steps is not None and cycles > max(1, (steps - num_warmup) // 2):
            got = f"{cycles} in {steps - num_warmup} steps after the warm-up"
            d.refuse("train.schedule.cycles", got, f"at most {max(1, (steps - num_warmup) // 2)}: two steps each")
    if kind == "wsd":
        decay = d.record("train.schedule.decay", schedule.decay)
        num_decay = arguments["num_decay_steps"] = max(1, math.ceil((steps or 0) * decay))
        if steps is not None and num_warmup + num_decay > steps:
            got = f"{num_warmup} steps of warm-up and {num_decay} of decay in {steps} steps"
            most = math.floor(100 * (steps - num_warmup) / steps) / 100
            d.refuse("train.schedule.decay", got, f"at most {most:g} beside that warm-up")
    if kind in {"cosine", "wsd"} and d.record("train.schedule.min_rate", schedule.min_rate):
        arguments["min_lr_rate" if kind == "cosine" else "min_lr_ratio"] = schedule.min_rate
    return kind, num_warmup, arguments
