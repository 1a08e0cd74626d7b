"""Plain LoRA of one rank and scale 1 in PEFT's layout, which every engine can load."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peftkit.model.adapter.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from peftkit.rundir import write_json
from peftkit.ship.files.tensors import SafetensorsWriter

LoraPair = tuple[torch.Tensor, torch.Tensor]  # A (rank, d_in), B (d_out, rank)
_PREFIX = "base_model.model."


def write_plain_lora(
    out: Path,
    config: Mapping[str, object],
    modules: Sequence[str],
    pair: Callable[[str], LoraPair],
    *,
    rank: int,
    parameters: Collection[str],
) -> None:
    """Write configuration and weights into a folder that exists.

    `pair` returns the factors of a module, of at most `rank`, which are padded with zeros. `parameters` are
    all of the base's: modules are listed by short names where these are unambiguous.
    """
    names = [f"{_PREFIX}{module}.lora_{side}.weight" for module in modules for side in "AB"]
    with SafetensorsWriter(out / ADAPTER_WEIGHTS, names) as writer:
        for module in modules:
            for side, tensor in zip("AB", pad_factors(pair(module), rank), strict=True):
                writer.put(f"{_PREFIX}{module}.lora_{side}.weight", tensor)
    write_json(out / ADAPTER_CONFIG, plain_lora_config(config, rank, target_modules(modules, parameters)))


def pad_factors(pair: LoraPair, rank: int) -> LoraPair:
    """Pad the factors with rows and columns of zeros up to `rank`."""
    a, b = pair
    num_missing = rank - a.shape[0]
    pad = torch.nn.functional.pad
    return pad(a, (0, 0, 0, num_missing)), pad(b, (0, num_missing))


def target_modules(adapted: Collection[str], parameters: Collection[str]) -> list[str]:
    """Return the adapted modules by the last part of their names where all of that name are, else in full."""
    unadapted = {name.removesuffix(".weight") for name in parameters} - set(adapted)
    ambiguous = {name.rsplit(".", 1)[-1] for name in unadapted}
    endings = {module: module.rsplit(".", 1)[-1] for module in adapted}
    return sorted({module if ending in ambiguous else ending for module, ending in endings.items()})


_BASE_KEYS = ("base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping")


def plain_lora_config(config: Mapping[str, object], rank: int, modules: list[str]) -> dict[str, Any]:
    """Return PEFT's configuration of plain LoRA with scale 1, and what `config` says of the base."""
    return {
        **{key: config[key] for key in _BASE_KEYS if key in config},
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
