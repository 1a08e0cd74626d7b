"""How a checkpoint holds its weights: quantized already, and by what; and the way to one that can be trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SUFFIX = re.compile(
    r"[-_.](awq|gptq(-int[48])?|fp8(-dynamic)?|(unsloth-)?bnb-[48]bit|int[48]|[48]bit|quantized\.\w+|w[48]a(8|16)|mxfp4|nvfp4"
    r"|mlx([-_].*)?)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class HeldFormat:
    """A format of quantized weights: its name, its bits per weight, and transformers' class that can undo it."""

    name: str
    bits: int
    undone_by: str = ""


def held_format(config: Mapping[str, Any]) -> HeldFormat | None:
    """Return how a configuration says that its weights are held; None for plain floating point."""
    text_config = config.get("text_config")
    parts = [config, text_config if isinstance(text_config, Mapping) else {}]
    for part in parts:
        if isinstance(settings := part.get("quantization_config"), Mapping):
            return _named_format(settings)
    if isinstance(settings := config.get("quantization"), Mapping) and "bits" in settings:
        return HeldFormat(f"MLX {settings['bits']}-bit", int(settings["bits"]))
    return None


def _named_format(settings: Mapping[str, Any]) -> HeldFormat:
    method = str(settings.get("quant_method") or "")
    if method == "fp8":
        return HeldFormat("FP8", 8, "FineGrainedFP8Config(dequantize=True)")
    if method == "mxfp4":
        return HeldFormat("MXFP4", 4, "Mxfp4Config(dequantize=True)")
    if method == "bitsandbytes":
        if settings.get("load_in_8bit"):
            return HeldFormat("bitsandbytes 8-bit", 8)
        return HeldFormat(f"bitsandbytes 4-bit ({settings.get('bnb_4bit_quant_type', 'fp4')})", 4)
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        weights = [group["weights"] for group in dict(groups or {}).values() if group.get("weights")]
        bits = int(weights[0].get("num_bits") or 8) if weights else 8
        return HeldFormat(f"compressed-tensors {bits}-bit", bits)
    bits = int(settings.get("bits") or settings.get("w_bit") or 4)
    return HeldFormat(f"{method.upper() or 'MLX'} {bits}-bit", bits)  # MLX alone names no method


def way_out(model: str, held: HeldFormat) -> str:
    """Return how to get weights that can be trained, from a checkpoint that holds them quantized."""
    name = model.rstrip("/").rpartition("/")[2]
    plain = _SUFFIX.sub("", name)
    if held.undone_by:
        program = f"AutoModelForCausalLM.from_pretrained({model!r}, quantization_config={held.undone_by})"
        return f"save it unquantized with transformers: {program}.save_pretrained(DIR), its tokenizer too; base: DIR"
    named = f", such as {plain}" if plain != name else ""
    method = "; method.name: qlora makes 4 bit of it" if held.bits == 4 else ""
    return f"take the repository that it was made from{named}{method}"
