"""The 4-bit base: bitsandbytes' configuration, and what must be mended after loading."""

from __future__ import annotations

from typing import Any

from peftkit.model.mends import bnb_cpu_repack
from peftkit.plan.plan import BasePlan


def quantization_config(base: BasePlan) -> Any:
    """transformers' BitsAndBytesConfig for a plan, or None where the base is not quantized."""
    if base.quant_type is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quant_type,
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, base.compute_dtype),
    )


def after_loading(model: Any) -> None:
    """Mend a freshly quantized model. Call it again after anything that makes new 4-bit layers."""
    bnb_cpu_repack.mend(model)
