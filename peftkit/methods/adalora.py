"""AdaLoRA: W + P E Q whose rank is moved to the modules that need it (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from peftkit.archs import ModelShape
from peftkit.methods.base import (
    Conflict,
    Excluded,
    Layers,
    Method,
    Options,
    PeftSpec,
    PositiveInt,
    RunSize,
    Selection,
    Targets,
    count_head,
    head_arguments,
    linear_roles,
    sum_by_role,
)


class AdaloraOptions(Options):
    """Low-rank adapters whose singular values are pruned to a budget while training."""

    name: Literal["adalora"]
    initial_rank: PositiveInt = Field(12, description="rank of each module at the start")
    rank: PositiveInt = Field(8, description="mean rank at the end")
    alpha: float = Field(32, gt=0, description="scale numerator")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Targets = "auto"
    layers: Layers = None
    exclude: Excluded = Field([])


def count(options: AdaloraOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count initial_rank * (d_in + d_out + 1) per module; pruned values become zero, but stay."""
    sizes = sum_by_role(selection.modules, lambda m: options.initial_rank * (m.d_in + m.d_out + 1))
    return {**sizes, **count_head(shape)}


def peft(options: AdaloraOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """Build peft.AdaLoraConfig; `schedule` adds the rank budget over time."""
    arguments = {
        "init_r": options.initial_rank,
        "target_r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": list(selection.names),
        **head_arguments(shape),
    }
    return PeftSpec("AdaLoraConfig", arguments)


def learning_rate(options: AdaloraOptions, shape: ModelShape, size: RunSize) -> tuple[float, str]:
    return 1e-3, "within the paper's 5e-4 to 3e-3 (Zhang et al. 2023, appendix)"


def conflicts(options: AdaloraOptions, shape: ModelShape, selection: Selection) -> Iterator[Conflict]:
    """Yield a conflict if the final rank exceeds the initial one: the budget can only shrink."""
    if options.rank > options.initial_rank:
        got = f"{options.rank}, above initial_rank {options.initial_rank}"
        yield Conflict("rank", got, "at most initial_rank", f"set initial_rank: {options.rank * 3 // 2}")


def schedule(num_steps: int) -> dict[str, Any]:
    """Return the rank budget: a tenth of the run at full rank, half of it pruning, then constant."""
    full_rank_steps, pruning_steps = num_steps // 10, max(1, num_steps // 2)
    return {
        "total_step": num_steps,
        "tinit": full_rank_steps,
        "tfinal": num_steps - full_rank_steps - pruning_steps,
        "deltaT": max(1, num_steps // 100),
    }


METHOD = Method(
    name="adalora",
    summary="LoRA that moves rank to where it matters",
    options=AdaloraOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_roles=linear_roles,
    conflicts=conflicts,
    schedule=schedule,
    min_steps=4,  # PEFT prunes at the first step of fewer, before anything is scored
    adds_penalty=True,
)
