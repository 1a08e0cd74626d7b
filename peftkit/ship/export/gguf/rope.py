"""Rotary positions: transformers' `rope_parameters` as llama.cpp's header keys and its tensor of factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftkit.ship.export.gguf.families import GgufFamily

GEMMA3_LOCAL_THETA = 10000.0  # of Gemma 3's sliding layers: fixed in llama.cpp
_REQUIRED_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
_COMMON_KEYS = {"rope_type", "type", "rope_theta"}
_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "beta_fast": (None, 32, 32.0),
    "beta_slow": (None, 1, 1.0),
    "truncate": (None, True),
    "attention_factor": (None,),
    "mscale": (None,),
    "mscale_all_dim": (None,),
}


@dataclass(frozen=True)
class GgufRope:
    """Rotary positions in GGUF: header keys without the architecture, a divisor per pair, and problems."""

    fields: dict[str, Any] = field(default_factory=dict)
    factors: list[float] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)  # (got, expected)


def gguf_rope(config: Mapping[str, Any], family: GgufFamily) -> GgufRope:
    """Convert a configuration's rotary positions. A family without rotary positions has none."""
    if not family.rope_types:
        return GgufRope()
    parameters = config.get("rope_parameters") or {}
    if "full_attention" in parameters:  # Gemma 3: one set for each kind of layer
        sliding = parameters.get("sliding_attention") or {}
        is_supported = (
            sliding.get("rope_type", "default") == "default" and sliding.get("rope_theta") == GEMMA3_LOCAL_THETA
        )
        rope = _layer_rope(parameters["full_attention"], config, family)
        if not is_supported:
            rope.problems.append(
                (f"sliding layers with rope {sliding}", f"rope_theta {GEMMA3_LOCAL_THETA:g}, unscaled")
            )
        return rope
    return _layer_rope(parameters, config, family)


def _layer_rope(rope: Mapping[str, Any], config: Mapping[str, Any], family: GgufFamily) -> GgufRope:
    kind = str(rope.get("rope_type", "default"))
    if kind not in family.rope_types or kind not in _REQUIRED_KEYS:
        return GgufRope(problems=[(f"rope_type {kind}", " or ".join(family.rope_types))])
    required = _REQUIRED_KEYS[kind]
    missing = sorted(key for key in (*required, "rope_theta") if rope.get(key) is None)
    if missing:
        return GgufRope(problems=[(f"rope_type {kind} without {', '.join(missing)}", "all of its parameters")])
    problems = [
        (f"rope {key} {value}", "the value that llama.cpp uses")
        for key, value in rope.items()
        if key not in required | _COMMON_KEYS and value not in _NEUTRAL_VALUES.get(key, (None,))
    ]
    fields: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    factors: list[float] = []
    if kind == "llama3":
        factors = llama3_factors(rope, int(config["head_dim"]))
    elif kind != "default":
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return GgufRope(fields, factors, problems)


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """Return the divisor of each frequency: 1 for short waves, `factor` for long ones, a ramp between them.

    1 / ((1 - x) / factor + x), with x = clamp((t - low) / (high - low), 0, 1), t = original length / wave.
    Source: transformers' `_compute_llama3_parameters`; llama.cpp takes the divisors as `rope_freqs.weight`.
    """
    factor, trained_length = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    divisors = []
    for pair in range(head_dim // 2):
        turns = trained_length / (2 * math.pi * float(rope["rope_theta"]) ** (2 * pair / head_dim))
        original_share = min(max((turns - low) / (high - low), 0.0), 1.0)  # of the original frequency
        divisors.append(1 / ((1 - original_share) / factor + original_share))
    return divisors
