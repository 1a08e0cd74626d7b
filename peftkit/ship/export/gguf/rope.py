"""Rotary positions: transformers' `rope_parameters` as llama.cpp's header keys and its tensor of factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftkit.ship.export.gguf.families import GgufFamily

LOCAL_THETA = 10000.0  # of Gemma 3's sliding layers: fixed in llama.cpp
_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}
_ALWAYS = {"rope_type", "type", "rope_theta"}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "beta_fast": (None, 32, 32.0),
    "beta_slow": (None, 1, 1.0),
    "truncate": (None, True),
    "attention_factor": (None,),
    "mscale": (None,),
    "mscale_all_dim": (None,),
}


@dataclass(frozen=True)
class Rope:
    """Header keys without the architecture, one divisor per pair of a head, and what is not possible."""

    fields: dict[str, Any] = field(default_factory=dict)
    factors: list[float] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)  # (got, expected)


def rope_of(config: Mapping[str, Any], family: GgufFamily) -> Rope:
    """What a configuration's positions become. A family without rotary positions has none."""
    if not family.rope_types:
        return Rope()
    found = config.get("rope_parameters") or {}
    if "full_attention" in found:  # Gemma 3: one set for each kind of layer
        local = found.get("sliding_attention") or {}
        plain = local.get("rope_type", "default") == "default" and local.get("rope_theta") == LOCAL_THETA
        rope = _one(found["full_attention"], config, family)
        if not plain:
            rope.problems.append(
                (f"sliding layers with rope {local}", f"rope_theta {LOCAL_THETA:g}, unscaled")
            )
        return rope
    return _one(found, config, family)


def _one(rope: Mapping[str, Any], config: Mapping[str, Any], family: GgufFamily) -> Rope:
    kind = str(rope.get("rope_type", "default"))
    if kind not in family.rope_types or kind not in _KEYS:
        return Rope(problems=[(f"rope_type {kind}", " or ".join(family.rope_types))])
    needed = _KEYS[kind]
    lacking = sorted(key for key in (*needed, "rope_theta") if rope.get(key) is None)
    if lacking:
        return Rope(problems=[(f"rope_type {kind} without {', '.join(lacking)}", "all of its parameters")])
    odd = [
        (f"rope {key} {value}", "the value that llama.cpp uses")
        for key, value in rope.items()
        if key not in needed | _ALWAYS and value not in _NEUTRAL.get(key, (None,))
    ]
    fields: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    factors: list[float] = []
    if kind == "llama3":
        factors = llama3_factors(rope, int(config["head_dim"]))
    elif kind != "default":
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return Rope(fields, factors, odd)


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """By what each frequency is divided: 1 for short waves, `factor` for long ones, between them a ramp.

    Source: transformers' `_compute_llama3_parameters`; llama.cpp takes the divisors as `rope_freqs.weight`.
    """
    factor, trained = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    divisors = []
    for pair in range(head_dim // 2):
        turns = trained / (2 * math.pi * float(rope["rope_theta"]) ** (2 * pair / head_dim))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)  # of the original frequency
        divisors.append(1 / ((1 - share) / factor + share))
    return divisors
