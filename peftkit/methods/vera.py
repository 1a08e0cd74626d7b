"""VeRA: shared random matrices, trained scaling vectors (Kopiczko et al. 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.archs import ModelShape
from peftkit.methods.base import (
    Excluded,
    Layers,
    Method,
    Options,
    PeftSpec,
    PositiveFloat,
    PositiveInt,
    RunSize,
    Selection,
    Targets,
    count_head,
    head_arguments,
    linear_roles,
    sum_by_role,
)


class VeraOptions(Options):
    """Random low-rank matrices shared by all layers; only their scalings are trained."""

    name: Literal["vera"]
    rank: PositiveInt = Field(256, description="rank of the shared random matrices")
    targets: Targets = "auto"
    layers: Layers = None
    exclude: Excluded = Field([])
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    d_initial: PositiveFloat = Field(0.1, description="start of the rank scalings")
    seed: int = Field(0, ge=0, description="seed of the shared random matrices, which are stored with the adapter")


def count(options: VeraOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count rank + d_out per module: the two scaling vectors (section 3.1 of the paper)."""
    return {**sum_by_role(selection.modules, lambda m: options.rank + m.d_out), **count_head(shape)}


def peft(options: VeraOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """Build peft.VeraConfig.

    The random matrices are saved too, so that another version cannot draw different ones.
    """
    arguments = {
        "r": options.rank,
        "vera_dropout": options.dropout,
        "d_initial": options.d_initial,
        "projection_prng_key": options.seed,
        "save_projection": True,
        "target_modules": list(selection.names),
        **head_arguments(shape),
    }
    return PeftSpec("VeraConfig", arguments)


def learning_rate(options: VeraOptions, shape: ModelShape, size: RunSize) -> tuple[float, str]:
    return 4e-3, "the paper's instruction tuning of Llama (Kopiczko et al. 2024, appendix A)"


METHOD = Method(
    name="vera",
    summary="trained scalings of shared random matrices",
    options=VeraOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_roles=linear_roles,
)
