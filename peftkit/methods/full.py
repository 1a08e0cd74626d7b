"""Full fine-tuning: every parameter is trained, no adapter."""

from __future__ import annotations

from typing import Literal

from peftkit.archs import ModelShape, Module
from peftkit.methods.base import Method, Options, PeftSpec, by_role, no_targets


class FullOptions(Options):
    """Every weight of the base is trained."""

    name: Literal["full"]


def count(options: FullOptions, shape: ModelShape, modules: tuple[Module, ...]) -> dict[str, int]:
    """All parameters: the blocks' linear layers by role, the rest together."""
    counts = by_role(shape.modules, lambda module: module.num_parameters)
    return {**counts, "embeddings, head and norms": shape.num_parameters - sum(counts.values())}


def peft(options: FullOptions, shape: ModelShape | None, targets: tuple[str, ...] | str) -> PeftSpec | None:
    return None


def learning_rate(num_parameters: int) -> tuple[float, str]:
    return 2e-5, "usual for supervised fine-tuning of all weights (Llama 2, Touvron et al. 2023, section 3.1)"


METHOD = Method(
    name="full",
    summary="train every weight",
    options=FullOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_targets=no_targets,
    trains_base=True,
)
