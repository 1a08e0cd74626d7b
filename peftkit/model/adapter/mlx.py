"""Adapters of Apple's mlx-lm, written as PEFT's: `peftkit convert FOLDER --out DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_mlx_config, read_adapter_config
from peftkit.model.base.convert import Converted
from peftkit.model.base.file_checks import check_model_folder
from peftkit.rundir import publish_folder
from peftkit.rundir.disk import resolve_new_folder

if TYPE_CHECKING:
    import torch

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
    from safetensors.torch import save_file

    check_model_folder(folder)
    config, where = read_adapter_config(folder), str(folder / ADAPTER_CONFIG)
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    settings = settings if isinstance(settings, dict) else {}
    scale: Any = settings.get("scale")
    dropout: Any = settings.get("dropout", 0.0)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (scale, dropout))
    if kind not in ("lora", "dora") or not numbers:
        got = f"fine_tune_type {kind} with lora_parameters {settings}"
        raise UserError(Problem(where, got, "lora or dora, with rank and scale as numbers"))
    modules = _factors_by_module(folder)
    ranks = {size for parts in modules.values() for size in (parts["lora_a"].shape[1], parts["lora_b"].shape[0])}
    has_magnitudes = {"m" in parts for parts in modules.values()}
    if len(ranks) != 1 or has_magnitudes != {kind == "dora"}:
        got = f"factors of the ranks {sorted(ranks)}, {'some ' if any(has_magnitudes) else 'none '}with magnitudes"
        raise UserError(Problem(str(folder / _WEIGHTS), got, f"a whole {kind} of one rank"))
    [rank] = ranks
    if settings.get("alpha", rank) != rank:
        got = f"alpha {settings['alpha']} beside scale {scale}"
        fix = f"early mlx-lm multiplied the scale by alpha / {rank}: write that product as scale, and leave alpha out"
        raise UserError(Problem(where, got, "scale alone, as mlx-lm reads it now", fix))
    tensors = {
        f"base_model.model.{module}.{_PARTS[part]}": tensor.T.contiguous() if part != "m" else tensor
        for module, parts in modules.items()
        for part, tensor in parts.items()
    }
    base = config.get("model")
    peft_config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"},
        **{"r": rank, "lora_alpha": scale * rank, "lora_dropout": float(dropout)},
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


def _factors_by_module(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Read the factors of each module. Raises UserError for anything but whole factors of linear layers."""
    from safetensors.torch import load_file

    file = folder / _WEIGHTS
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        got = f"a file that is not safetensors, or is damaged ({error})"
        raise UserError(Problem(str(file), got, "the adapter's weights", "copy it again")) from None
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        is_factor = part in _PARTS and tensor.ndim == (1 if part == "m" else 2) and tensor.is_floating_point()
        is_table = module.rpartition(".")[2] in {"embed_tokens", "wte", "tok_embeddings"}
        if not module or not is_factor or is_table or not bool(tensor.isfinite().all()):
            expected = "finite lora_a, lora_b and m of linear layers"
            raise UserError(Problem(f"{file} {name}", f"{tensor.dtype} of shape {tuple(tensor.shape)}", expected))
        modules.setdefault(module, {})[part] = tensor
    lacking = sorted(module for module, parts in modules.items() if not {"lora_a", "lora_b"} <= parts.keys())
    if lacking or not modules:
        got = f"{lacking[0]} with one factor" if lacking else "no tensors"
        raise UserError(Problem(str(file), got, "lora_a and lora_b of each module"))
    return modules
