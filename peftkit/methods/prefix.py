"""Prefix tuning: trained keys and values before every layer's context (Li and Liang 2021)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from peftkit.archs import ModelShape, Module
from peftkit.methods.base import Method, Options, PeftSpec, PositiveInt, no_targets


class PrefixOptions(Options):
    """Virtual tokens whose keys and values are trained in each layer."""

    name: Literal["prefix"]
    virtual_tokens: PositiveInt = Field(30, description="length of the prefix")
    projection: bool = Field(False, description="train through an MLP, as in the paper; steadier, larger")
    projection_hidden: PositiveInt | None = Field(None, description="width of that MLP; kv size unless given")


def count(options: PrefixOptions, shape: ModelShape, modules: tuple[Module, ...]) -> dict[str, int]:
    """tokens x layers x (keys + values); with projection: embedding and a two-layer MLP with biases."""
    dims = shape.dims
    table = dims.num_layers * 2 * dims.kv
    if not options.projection:
        return {"prefix": options.virtual_tokens * table}
    inner = options.projection_hidden or dims.kv
    mlp = (dims.kv * inner + inner) + (inner * table + table)
    return {"prefix": options.virtual_tokens * dims.kv, "projection": mlp}


def peft(options: PrefixOptions, shape: ModelShape | None, targets: tuple[str, ...] | str) -> PeftSpec:
    """peft.PrefixTuningConfig; PEFT reads layers and key-value heads from the model's configuration."""
    arguments: dict[str, Any] = {
        "num_virtual_tokens": options.virtual_tokens,
        "prefix_projection": options.projection,
    }
    if options.projection:
        inner = options.projection_hidden or (shape.dims.kv if shape else None)
        arguments["encoder_hidden_size"] = inner
    return PeftSpec("PrefixTuningConfig", arguments)


def learning_rate(num_parameters: int) -> tuple[float, str]:
    return 1e-2, "PEFT's own prefix tuning example; prefixes start from noise and want large steps"


METHOD = Method(
    name="prefix",
    summary="trained keys and values before the context",
    options=PrefixOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_targets=no_targets,
    allows_checkpointing=False,
)
