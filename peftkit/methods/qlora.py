"""QLoRA: LoRA over a base in 4-bit NormalFloat with double quantization (Dettmers et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from peftkit.archs import ModelShape
from peftkit.methods import lora
from peftkit.methods.base import Conflict, Selection
from peftkit.methods.lora import LoraOptions


class QloraOptions(LoraOptions):
    """LoRA's options, and how the frozen base is stored."""

    name: Literal["qlora"]  # type: ignore[assignment]
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type of the frozen base")
    double_quant: bool = Field(True, description="quantize the quantization constants too")


def conflicts(options: QloraOptions, shape: ModelShape, selection: Selection) -> Iterator[Conflict]:
    """Yield LoRA's conflicts, and one for 4-bit experts, which PEFT would leave out silently."""
    yield from lora.conflicts(options, shape, selection)
    if selection.parameters:
        yield Conflict(
            "targets",
            f"{selection.parameters[0]} of a 4-bit base",
            "modules that are layers of their own",
            "fused weights in 4-bit cannot carry LoRA: adapt attention, or use method lora",
        )


METHOD = replace(
    lora.METHOD,
    name="qlora",
    summary="LoRA over a 4-bit base",
    options=QloraOptions,
    quantized=True,
    conflicts=conflicts,
)
