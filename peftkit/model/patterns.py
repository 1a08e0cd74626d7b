"""Rank and scale of one LoRA module, as PEFT resolves `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def effective_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """(rank, what B @ A is multiplied by) of a module, from the content of adapter_config.json.

    `module` is its full name in the base, without PEFT's prefix. Where two patterns match, the first wins.
    PEFT sorts them when it saves: the file's order is that of every later load, and may be another than that
    of the training.
    Source: `LoraModel._create_and_replace`.
    """
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = int(ranks.get(get_pattern_key(ranks.keys(), module), config["r"]))
    alpha = float(alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
