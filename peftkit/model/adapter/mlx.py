"""Adapters of Apple's mlx-lm, written as PEFT's: `peftkit convert FOLDER --out DIR`."""

from __future__ import annotations

import json
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_mlx_config, read_adapter_config
from peftkit.model.base.convert import Converted
from peftkit.model.base.file_checks import check_model_folder
from peftkit.rundir import publish_folder
from peftkit.rundir.disk import resolve_new_folder

_WEIGHTS = "adapters.safetensors"
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def is_mlx_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter as mlx-lm writes it."""
    is_there = (folder / ADAPTER_CONFIG).is_file() and (folder / _WEIGHTS).is_file()
    return is_there and is_mlx_config(read_adapter_config(folder))


def convert_mlx_adapter(folder: Path, *, out: str | Path) -> Converted:
    """Write a LoRA or DoRA adapter of mlx-lm as PEFT's, into a new folder.

    mlx-lm computes x W^T + scale (x a) b with a (d_in, rank) and b (rank, d_out): A is a^T, B is b^T, and alpha is
    scale times rank. Raises UserError for full fine-tuning, and for tensors that are none of these.
    """
    from safetensors.torch import load_file, save_file

    check_model_folder(folder)
    config, where = read_adapter_config(folder), str(folder / ADAPTER_CONFIG)
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    settings = settings if isinstance(settings, dict) else {}
    scale = settings.get("scale")
    if kind not in {"lora", "dora"} or not isinstance(scale, int | float) or isinstance(scale, bool):
        got = f"fine_tune_type {kind} with lora_parameters {settings}"
        raise UserError(Problem(where, got, "lora or dora, with rank and scale"))
    tensors, modules, ranks = {}, set[str](), set[int]()
    for name, tensor in load_file(folder / _WEIGHTS).items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS or tensor.ndim != (1 if part == "m" else 2):
            expected = "lora_a, lora_b and m of linear layers"
            raise UserError(Problem(f"{folder / _WEIGHTS} {name}", f"shape {tuple(tensor.shape)}", expected))
        modules.add(module)
        ranks |= {tensor.shape[1]} if part == "lora_a" else set()
        tensors[f"base_model.model.{module}.{_PARTS[part]}"] = tensor.T.contiguous() if part != "m" else tensor
    if len(ranks) != 1:
        raise UserError(Problem(str(folder / _WEIGHTS), f"ranks {sorted(ranks)}", "factors of one rank"))
    [rank] = ranks
    base = config.get("model")
    peft_config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"},
        **{"r": rank, "lora_alpha": scale * rank, "lora_dropout": float(settings.get("dropout") or 0.0)},
        "use_dora": kind == "dora",
        "target_modules": sorted(modules),
        "base_model_name_or_path": base if isinstance(base, str) else None,
    }
    target = resolve_new_folder(str(out))
    with publish_folder(target) as staging:
        (staging / ADAPTER_CONFIG).write_text(json.dumps(peft_config, indent=2), encoding="utf-8")
        save_file(tensors, staging / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return Converted(target, (ADAPTER_WEIGHTS,), len(tensors), num_bytes, ())
