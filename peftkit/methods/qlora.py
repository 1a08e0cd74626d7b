"""QLoRA: LoRA over a base in 4-bit NormalFloat with double quantization (Dettmers et al. 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from peftkit.methods.lora import METHOD as LORA
from peftkit.methods.lora import LoraOptions


class QloraOptions(LoraOptions):
    """LoRA's options, and how the frozen base is stored."""

    name: Literal["qlora"]  # type: ignore[assignment]
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type of the frozen base")
    double_quant: bool = Field(True, description="quantize the quantization constants too")


METHOD = replace(LORA, name="qlora", summary="LoRA over a 4-bit base", options=QloraOptions, quantized=True)
