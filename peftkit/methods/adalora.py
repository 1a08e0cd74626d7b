"""AdaLoRA: LoRA as P E Q whose rank is moved to where it matters (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.archs import ModelShape
from peftkit.methods.base import (
    Conflict,
    Method,
    Options,
    PeftSpec,
    PositiveInt,
    Selection,
    Targets,
    by_role,
    count_head,
    head_arguments,
    linear_roles,
)


class AdaloraOptions(Options):
    """Low-rank adapters whose singular values are pruned to a budget while training."""

    name: Literal["adalora"]
    initial_rank: PositiveInt = Field(12, description="rank of each module at the start")
    rank: PositiveInt = Field(8, description="mean rank that is left at the end")
    alpha: float = Field(32, gt=0, description="scale numerator")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Targets = "auto"


def count(options: AdaloraOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """initial rank x (d_in + d_out + 1) per module; what is pruned later is zero, not gone."""
    sizes = by_role(selection.modules, lambda m: options.initial_rank * (m.d_in + m.d_out + 1))
    return {**sizes, **count_head(shape)}


def peft(options: AdaloraOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """peft.AdaLoraConfig; the schedule of the budget is filled in once the number of steps is known."""
    arguments = {
        "init_r": options.initial_rank,
        "target_r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": list(selection.names),
        **head_arguments(shape),
    }
    return PeftSpec("AdaLoraConfig", arguments)


def learning_rate(num_parameters: int) -> tuple[float, str]:
    return 1e-3, "within the paper's 5e-4 to 3e-3 (Zhang et al. 2023, appendix)"


def conflicts(options: AdaloraOptions, shape: ModelShape, selection: Selection) -> Iterator[Conflict]:
    """The budget can only shrink."""
    if options.rank > options.initial_rank:
        got = f"{options.rank}, above initial_rank {options.initial_rank}"
        yield Conflict("rank", got, "at most initial_rank", f"set initial_rank: {options.rank * 3 // 2}")


METHOD = Method(
    name="adalora",
    summary="LoRA that moves rank to where it matters",
    options=AdaloraOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_roles=linear_roles,
    conflicts=conflicts,
)
