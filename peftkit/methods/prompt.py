"""Prompt tuning: trained embeddings before the input (Lester et al. 2021)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from peftkit.archs import ModelShape
from peftkit.methods.base import (
    Method,
    Options,
    PeftSpec,
    PositiveInt,
    Selection,
    count_head,
    head_arguments,
)


class PromptOptions(Options):
    """Virtual tokens whose input embeddings are trained."""

    name: Literal["prompt"]
    virtual_tokens: PositiveInt = Field(20, description="length of the learned prompt")
    init: Literal["random", "vocabulary"] = Field(
        "vocabulary",
        description="start from embeddings of random words (the paper's better start), or from noise",
    )


def _num_sides(shape: ModelShape) -> int:
    """PEFT keeps a prompt for the encoder and one for the decoder."""
    return 2 if shape.task == "seq2seq" else 1


def count(options: PromptOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """tokens x hidden, twice for encoder-decoders."""
    return {"prompt": options.virtual_tokens * shape.dims.hidden * _num_sides(shape), **count_head(shape)}


def peft(options: PromptOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """peft.PromptTuningConfig, with the geometry given: state-space models name no heads to guess it from."""
    arguments: dict[str, Any] = {
        "num_virtual_tokens": options.virtual_tokens,
        "prompt_tuning_init": {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}[options.init],
        "num_layers": shape.dims.num_layers,
        "num_attention_heads": shape.dims.heads,
        "token_dim": shape.dims.hidden,
        "num_transformer_submodules": _num_sides(shape),
        **head_arguments(shape),
    }
    return PeftSpec("PromptTuningConfig", arguments)


def learning_rate(num_parameters: int) -> tuple[float, str]:
    return 3e-2, "a tenth of the paper's 0.3 (Lester et al. 2021, section 3), which was for Adafactor"


def refuses(shape: ModelShape) -> str:
    """A token classifier's output would have the prompt's positions in it."""
    tags = shape.task == "token-classification"
    return "PEFT leaves the prompt's positions in a token classifier's output" if tags else ""


METHOD = Method(
    name="prompt",
    summary="trained embeddings before the input",
    options=PromptOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    refuses=refuses,
    virtual_tokens=True,
    mergeable=False,
)
