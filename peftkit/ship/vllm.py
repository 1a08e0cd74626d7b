"""An adapter as vLLM serves it: plain LoRA of one rank and one scale, with its modules listed by name.

What vLLM takes and refuses is told at the first request, after the server has loaded the model; it is told
here instead. After vLLM's `PEFTHelper` (vllm/lora/peft_helper.py) and its page on LoRA adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.errors import Problem, UserError
from peftkit.model.edits import Edit, Edits
from peftkit.model.saved import CONFIG, WEIGHTS
from peftkit.rundir import write_json
from peftkit.ship.tensors import Entry, Writer

_SERVED_RANK = 16  # vLLM's own --max-lora-rank, unless it is told another
_PREFIX = "base_model.model."
_MERGE = "serve merged weights: peftkit merge {path} --out DIR"
_KINDS = {
    "dora": "DoRA, which is no low-rank change",
    "embedding": "an adapter of embeddings",
    "experts": "an adapter of fused experts",
    "rows": "trained rows of tokens",
    "scale": "IA3",
    "shift": "a bias in the adapter",
    "vera": "VeRA",
    "whole": "a module that is trained whole",
}


@dataclass(frozen=True)
class Rewritten:
    """What was changed for vLLM, in words; `rank` is what it has to be started for."""

    rank: int
    changes: tuple[str, ...]

    @property
    def said(self) -> str:
        """How to start it."""
        needed = f" --max-lora-rank {self.rank}" if self.rank > _SERVED_RANK else ""
        return f"vllm serve BASE --enable-lora{needed} --lora-modules NAME=DIR"


def refuse_unservable(path: Path, edits: Edits) -> None:
    """Raises UserError, all at once, for what vLLM rejects, each with where it stands and the way out."""
    problems = list(_problems(path, edits))
    if problems:
        raise UserError(problems)


def _problems(path: Path, edits: Edits) -> Iterator[Problem]:
    fix = _MERGE.format(path=path)
    for kind, words in _KINDS.items():
        found = [name for name, own in edits.items() if any(edit.kind == kind for edit in own)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            yield Problem(str(path), f"{words} ({found[0]}{more})", "plain LoRA, which vLLM serves", fix)


def write_for_vllm(
    adapter: Path,
    config: Mapping[str, Any],
    edits: Edits,
    tensors: Mapping[str, Entry],
    out: Path,
    *,
    parameters: Collection[str],
) -> Rewritten:
    """Write configuration and weights into `out`, a folder that is there; `parameters` are all of the base's.

    Scales are folded into B, ranks padded with zeros to the largest, both exact but for one rounding of B.
    Raises UserError for what vLLM rejects.
    """
    edits = {name: tuple(edit for edit in own if not edit.copied) for name, own in edits.items()}
    edits = {name: own for name, own in edits.items() if own}
    refuse_unservable(adapter, edits)
    pairs = {name.removesuffix(".weight"): own[0] for name, own in edits.items()}
    rank = max(tensors[edit.tensors["A"]].shape[0] for edit in pairs.values())
    names = [f"{_PREFIX}{module}.lora_{side}.weight" for module in pairs for side in "AB"]
    with Writer(out / WEIGHTS, names) as writer:
        for module, edit in pairs.items():
            for side, tensor in zip("AB", _pair(edit, tensors, rank), strict=True):
                writer.put(f"{_PREFIX}{module}.lora_{side}.weight", tensor)
    write_json(out / CONFIG, _plain(config, rank, _listed(pairs, parameters)))
    return Rewritten(rank, tuple(_changes(config, pairs, tensors, rank)))


def _pair(edit: Edit, tensors: Mapping[str, Entry], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, d_in) and B (d_out, rank) with the scale in B."""
    a, b = (tensors[edit.tensors[side]].read() for side in "AB")
    if edit.scale != 1.0:
        b = (b.float() * edit.scale).to(b.dtype)
    missing = rank - a.shape[0]
    return (
        torch.nn.functional.pad(a, (0, 0, 0, missing)),
        torch.nn.functional.pad(b, (0, missing)),
    )


def _listed(adapted: Collection[str], parameters: Collection[str]) -> list[str]:
    """The modules by the last part of their names where all of that name are adapted, else by whole names."""
    others = {name.removesuffix(".weight") for name in parameters} - set(adapted)
    shared = {name.rsplit(".", 1)[-1] for name in others}
    endings = {module: module.rsplit(".", 1)[-1] for module in adapted}
    return sorted({module if ending in shared else ending for module, ending in endings.items()})


def _plain(config: Mapping[str, Any], rank: int, modules: list[str]) -> dict[str, Any]:
    """PEFT's configuration of plain LoRA, whose scale is 1."""
    return {
        **config,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": modules,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _changes(
    config: Mapping[str, Any], pairs: Mapping[str, Edit], tensors: Mapping[str, Entry], rank: int
) -> Iterator[str]:
    scales = sorted({edit.scale for edit in pairs.values()})
    if scales != [1.0]:
        shown = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        yield f"scales of {shown} are folded into B"
    ranks = sorted({tensors[edit.tensors["A"]].shape[0] for edit in pairs.values()})
    if len(ranks) > 1:
        yield f"ranks of {ranks[0]} to {rank} are padded with zeros to {rank}"
    if config.get("use_rslora"):
        yield "rsLoRA is written as plain LoRA"
    if not isinstance(config.get("target_modules"), list):
        yield "the modules are listed by name"
