"""Plain LoRA of one rank whose scale is 1, written as PEFT reads it: what everybody can load."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peftkit.model.adapter.load import CONFIG, WEIGHTS
from peftkit.rundir import write_json
from peftkit.ship.files.tensors import Writer

Pair = tuple[torch.Tensor, torch.Tensor]  # A (rank, d_in), B (d_out, rank)
_PREFIX = "base_model.model."


def write_plain(
    out: Path,
    config: Mapping[str, Any],
    modules: Sequence[str],
    pair: Callable[[str], Pair],
    *,
    rank: int,
    parameters: Collection[str],
) -> None:
    """Write configuration and weights into a folder that is there.

    `pair` gives the factors of a module, of at most `rank`: they are padded with zeros. `parameters` are all
    of the base's, by which modules are listed shortly where that is not ambiguous.
    """
    names = [f"{_PREFIX}{module}.lora_{side}.weight" for module in modules for side in "AB"]
    with Writer(out / WEIGHTS, names) as writer:
        for module in modules:
            for side, tensor in zip("AB", padded(pair(module), rank), strict=True):
                writer.put(f"{_PREFIX}{module}.lora_{side}.weight", tensor)
    write_json(out / CONFIG, plain_config(config, rank, listed(modules, parameters)))


def padded(pair: Pair, rank: int) -> Pair:
    """The factors with rows and columns of zeros up to `rank`."""
    a, b = pair
    missing = rank - a.shape[0]
    pad = torch.nn.functional.pad
    return pad(a, (0, 0, 0, missing)), pad(b, (0, missing))


def listed(adapted: Collection[str], parameters: Collection[str]) -> list[str]:
    """The modules by the last part of their names where all of that name are adapted, else by whole names."""
    others = {name.removesuffix(".weight") for name in parameters} - set(adapted)
    shared = {name.rsplit(".", 1)[-1] for name in others}
    endings = {module: module.rsplit(".", 1)[-1] for module in adapted}
    return sorted({module if ending in shared else ending for module, ending in endings.items()})


_KEPT = ("base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping")


def plain_config(config: Mapping[str, Any], rank: int, modules: list[str]) -> dict[str, Any]:
    """PEFT's configuration of plain LoRA, whose scale is 1; of another one only what it says of the base."""
    return {
        **{key: config[key] for key in _KEPT if key in config},
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "modules_to_save": None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": bool(config.get("fan_in_fan_out", False)),
        "init_lora_weights": True,
        "inference_mode": True,
    }
