"""Prompt tuning: trained embeddings before the input (Lester et al. 2021)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from peftkit.archs import ModelShape
from peftkit.methods.base import Method, Options, PeftSpec, PositiveInt, RunSize, Selection, count_head, head_arguments


class PromptOptions(Options):
    """Virtual tokens whose input embeddings are trained."""

    name: Literal["prompt"]
    virtual_tokens: PositiveInt = Field(20, description="length of the learned prompt")
    init: Literal["random", "vocabulary"] = Field(
        "vocabulary", description="start from embeddings of random words (the paper's better start), or from noise"
    )


def _num_prompts(shape: ModelShape) -> int:
    """Return the number of prompts that PEFT keeps: two for an encoder-decoder, else one."""
    return 2 if shape.task == "seq2seq" else 1


def count(options: PromptOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count tokens * hidden, twice for encoder-decoders."""
    return {"prompt": options.virtual_tokens * shape.dims.hidden * _num_prompts(shape), **count_head(shape)}


def peft(options: PromptOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """Build peft.PromptTuningConfig with explicit geometry.

    State-space models have no heads for PEFT to guess it from.
    """
    arguments: dict[str, Any] = {
        "num_virtual_tokens": options.virtual_tokens,
        "prompt_tuning_init": {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}[options.init],
        "num_layers": shape.dims.num_layers,
        "num_attention_heads": shape.dims.heads,
        "token_dim": shape.dims.hidden,
        "num_transformer_submodules": _num_prompts(shape),
        **head_arguments(shape),
    }
    return PeftSpec("PromptTuningConfig", arguments)


def learning_rate(options: PromptOptions, shape: ModelShape, size: RunSize) -> tuple[float, str]:
    return 3e-2, "a tenth of the paper's 0.3 (Lester et al. 2021, section 3), which was for Adafactor"


def refuses(shape: ModelShape) -> str:
    """Return a reason for token classifiers, whose output would contain the prompt's positions."""
    is_token_classifier = shape.task == "token-classification"
    return "PEFT leaves the prompt's positions in a token classifier's output" if is_token_classifier else ""


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
