"""How a checkpoint holds its weights: quantized already, and by what; and the way to one that can be trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SUFFIX = re.compile(
    r"[-_.](awq|gptq(-int[48])?|fp8(-dynamic)?|(unsloth-)?bnb-[48]bit|int[48]|[48]bit|quantized\.\w+|w[48]a(8|16)|mxfp4|nvfp4|dwq|autoround|auto-round"
    r"|mlx([-_].*)?)$",
    re.IGNORECASE,
)
_BITS = {"fbgemm_fp8": 8, "modelopt": None, "quanto": None, "torchao": None, "bitnet": 2}  # where settings say none


@dataclass(frozen=True)
class HeldFormat:
    """A format of quantized weights: its name, its bits (0: unknown), and how transformers can undo it, if at all."""

    name: str
    bits: int
    undone_by: str = ""  # "fp8" | "mxfp4" | "bitsandbytes"


def held_format(config: Mapping[str, Any]) -> HeldFormat | None:
    """Return how a configuration says that its weights are held; None for plain floating point."""
    text_config = config.get("text_config")
    parts = [config, text_config if isinstance(text_config, Mapping) else {}]
    for part in parts:
        settings = part.get("quantization_config")
        if not isinstance(settings, Mapping) or not settings:
            continue
        flags = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
        if settings.get("quant_method") != "bitsandbytes" or any(settings.get(flag) for flag in flags):
            return _named_format(settings)
    if isinstance(settings := config.get("quantization"), Mapping) and "bits" in settings:
        return _with_bits("MLX", settings["bits"])
    return None


def _with_bits(name: str, bits: object) -> HeldFormat:
    """Return a format with its bits; 0 where they are not a whole number, as of mixed formats."""
    known = int(str(bits)) if re.fullmatch("[0-9]{1,3}", str(bits)) else 0
    return HeldFormat(f"{name} {known}-bit" if known else f"{name}, of mixed or unknown bits", known)


def _named_format(settings: Mapping[str, Any]) -> HeldFormat:
    method = str(settings.get("quant_method") or "")
    if method == "fp8":
        return HeldFormat("FP8", 8, method)
    if method == "mxfp4":
        return HeldFormat("MXFP4", 4, method)
    if method == "bitsandbytes":
        if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
            return HeldFormat("bitsandbytes 8-bit", 8, method)
        return HeldFormat(f"bitsandbytes 4-bit ({settings.get('bnb_4bit_quant_type', 'fp4')})", 4, method)
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
        bits = {str(part.get("num_bits")) for part in weights if isinstance(part, Mapping)}
        return _with_bits(method, bits.pop() if len(bits) == 1 else None)
    if method == "modelopt" and settings.get("quant_algo"):
        algorithm = str(settings["quant_algo"])
        return HeldFormat(f"ModelOpt {algorithm}", 4 if "4" in algorithm else 8)
    bits_of = _BITS.get(method, settings.get("bits", settings.get("w_bit")))
    return _with_bits(method.upper() or "MLX", bits_of)  # MLX alone names no method


def way_out(model: str, held: HeldFormat) -> str:
    """Return how to get weights that can be trained, from a checkpoint that holds them quantized."""
    name = model.rstrip("/").rpartition("/")[2]
    plain = name
    while (shorter := _SUFFIX.sub("", plain)) != plain:
        plain = shorter
    named = f", such as {plain}" if plain != name else ""
    if held.undone_by:
        return f"base.dequantize=true converts it once to bfloat16; or take what it was made from{named}"
    method = "; method.name: qlora makes 4 bit of it" if held.bits == 4 else ""
    return f"take the repository that it was made from{named}{method}"
