"""Full fine-tuning: every parameter is trained, no adapter."""

from __future__ import annotations

from typing import Literal

from peftkit.archs import ModelShape
from peftkit.methods.base import Method, Options, PeftSpec, RunSize, Selection, full_rate_by_law, sum_by_role


class FullOptions(Options):
    """Every weight of the base is trained."""

    name: Literal["full"]


def count(options: FullOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count all parameters: linear layers and experts by role, everything else together."""
    counts = sum_by_role(shape.modules, lambda module: module.num_parameters)
    return {**counts, "the rest": shape.num_parameters - sum(counts.values())}


def peft(options: FullOptions, shape: ModelShape, selection: Selection) -> PeftSpec | None:
    return None


def learning_rate(options: FullOptions, shape: ModelShape, size: RunSize) -> tuple[float, str]:
    return full_rate_by_law(shape, size), f"by the width of {shape.dims.hidden} and {size} (docs/quality.md)"


METHOD = Method(
    name="full",
    summary="train every weight",
    options=FullOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    trains_base=True,
)
