"""Adapters of other trainers as PEFT reads them, in a new folder: other names, or another order of experts.

`peftkit convert ADAPTER --rename OLD=NEW`, `peftkit convert ADAPTER --expert-major`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.model.adapter.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config, refuse_unknown_type
from peftkit.model.base.convert import Converted
from peftkit.model.base.file_checks import check_adapter_weights, check_model_folder
from peftkit.rundir import MANIFEST, publish_folder
from peftkit.rundir.disk import resolve_new_folder

if TYPE_CHECKING:
    import torch


def rewrite_adapter(folder: Path, renames: Sequence[str], *, expert_major: bool = False, out: str | Path) -> Converted:
    """Write an adapter with other names of its tensors, or another order of its experts, into a new folder.

    Each of `renames` is OLD=NEW: the first OLD in a name becomes NEW. `expert_major` says how lora_B of fused
    experts is packed now. Raises UserError where one of them changes nothing, or makes two names one.
    """
    from safetensors.torch import load_file, save_file

    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(Problem(str(folder), f"no {ADAPTER_CONFIG}", "an adapter folder"))
    refuse_unknown_type(read_adapter_config(folder), str(folder / ADAPTER_CONFIG))
    check_model_folder(folder)
    check_adapter_weights(folder)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    names = {name: name for name in tensors}
    for text in renames:
        old, equals, new = text.partition("=")
        changed = {name: current.replace(old, new, 1) for name, current in names.items()} if old else names
        if not equals or changed == names:
            parts = sorted({part for name in tensors for part in name.split(".")})
            fix = did_you_mean(old.strip("."), parts) if equals and old else "OLD= takes OLD out"
            raise UserError(Problem("--rename", text, "OLD=NEW, with OLD in the name of a tensor", fix))
        names = changed
    if len(set(names.values())) < len(names):
        raise UserError(Problem("--rename", " ".join(renames), "names that stay different from each other"))
    if expert_major:
        tensors = _rank_major(tensors, read_adapter_config(folder), folder)
    target = resolve_new_folder(str(out))
    with publish_folder(target) as staging:
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix in {".json", ".jinja", ".model", ".txt"} and file.name != MANIFEST:
                shutil.copyfile(file, staging / file.name)
        save_file({names[name]: tensor for name, tensor in tensors.items()}, staging / ADAPTER_WEIGHTS)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return Converted(target, (ADAPTER_WEIGHTS,), len(tensors), num_bytes, ())


def _rank_major(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path
) -> dict[str, torch.Tensor]:
    """Return the tensors with lora_B of fused experts packed rank by rank, as PEFT reads it.

    (d_out, experts x rank) becomes (d_out, rank x experts). Raises UserError for an adapter without fused experts.
    """
    names = [n for n, t in tensors.items() if ".experts." in n and n.endswith("lora_B.weight") and t.ndim == 2]
    rank = config.get("r")
    rank = rank if isinstance(rank, int) and rank > 0 else 0
    sizes = {divmod(tensors[name].shape[1], rank) for name in names} if rank else set()
    if len(sizes) != 1 or config.get("rank_pattern") or any(rest or num < 2 for num, rest in sizes):
        got = f"{len(names)} factors of fused experts, r {config.get('r')}, rank_pattern {config.get('rank_pattern')}"
        raise UserError(Problem(f"{folder} --expert-major", got, "an adapter of fused experts, all of one rank"))
    rows = {name: len(tensors[name]) for name in names}
    packed = {n: tensors[n].reshape(rows[n], -1, rank).transpose(1, 2).flatten(1).contiguous() for n in names}
    return {**tensors, **packed}


def expert_order_doubt(folder: Path, config: Mapping[str, Any]) -> str:
    """Return what must be told of an adapter of fused experts that Unsloth may have packed; empty for others.

    Its lora_B was packed expert by expert until September 2026; PEFT and vLLM read it rank by rank. The shapes are the
    same, and nothing in the files tells which it is (unsloth-zoo's pull requests 1232 and 1269).
    """
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace")[:4096] if readme.is_file() else ""
    origin = f"{config.get('base_model_name_or_path')} {config.get('auto_mapping')} {text}".lower()
    if "unsloth" not in origin or not any("expert" in str(name) for name in config.get("target_parameters") or ()):
        return ""
    return (
        "LoRA of fused experts, perhaps of an Unsloth before September 2026, which packed them expert by expert, where "
        "PEFT reads them rank by rank: if answers are wrong, peftkit convert ADAPTER --expert-major --out FIXED"
    )
