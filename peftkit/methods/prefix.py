"""Prefix tuning: trained keys and values before every layer's context (Li and Liang 2021)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from peftkit.archs import ModelShape
from peftkit.methods.base import Method, Options, PeftSpec, PositiveInt, RunSize, Selection, count_head, head_arguments


class PrefixOptions(Options):
    """Virtual tokens whose keys and values are trained in each layer."""

    name: Literal["prefix"]
    virtual_tokens: PositiveInt = Field(30, description="length of the prefix")
    projection: bool = Field(False, description="train through an MLP, as in the paper; steadier, larger")
    projection_hidden: PositiveInt | None = Field(None, description="width of that MLP; kv size unless given")


def count(options: PrefixOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count tokens * layers * (keys + values); with projection: embedding and a two-layer MLP with biases."""
    dims = shape.dims
    table = dims.num_layers * 2 * dims.kv
    if not options.projection:
        return {"prefix": options.virtual_tokens * table, **count_head(shape)}
    inner = options.projection_hidden or dims.kv
    mlp = (dims.kv * inner + inner) + (inner * table + table)
    return {"prefix": options.virtual_tokens * dims.kv, "projection": mlp, **count_head(shape)}


def peft(options: PrefixOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """Build peft.PrefixTuningConfig with explicit geometry: PEFT would guess it wrongly for MQA and MPT."""
    arguments: dict[str, Any] = {
        "num_virtual_tokens": options.virtual_tokens,
        "prefix_projection": options.projection,
        "num_layers": shape.dims.num_layers,
        "num_attention_heads": shape.dims.kv_heads,
        "token_dim": shape.dims.kv,
        **head_arguments(shape),
    }
    if options.projection:
        arguments["encoder_hidden_size"] = options.projection_hidden or shape.dims.kv
    return PeftSpec("PrefixTuningConfig", arguments)


def learning_rate(options: PrefixOptions, shape: ModelShape, size: RunSize) -> tuple[float, str]:
    return 1e-2, "PEFT's own prefix tuning example; prefixes start from noise and want large steps"


METHOD = Method(
    name="prefix",
    summary="trained keys and values before the context",
    options=PrefixOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    nearest="prompt",
    allows_checkpointing=False,
    virtual_tokens=True,
    mergeable=False,
)
