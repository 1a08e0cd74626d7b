"""Adapters rewritten for vLLM: plain LoRA of one rank and one scale, with its modules listed by name.

vLLM reports what it refuses at the first request, after the server has loaded the model; it is reported
here instead. After vLLM's `PEFTHelper` (vllm/lora/peft_helper.py) and its page on LoRA adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.edits import Edit, Edits
from peftkit.ship.files.tensors import TensorEntry
from peftkit.ship.merge.plain_lora import LoraPair, write_plain_lora

_DEFAULT_MAX_RANK = 16  # vLLM's own --max-lora-rank, unless it is told another
_MERGE_HINT = "serve merged weights: peftkit merge {path} --out DIR"
_UNSERVED_KINDS = {
    "dora": "DoRA, which is not a low-rank change",
    "embedding": "an adapter of embeddings",
    "experts": "an adapter of fused experts",
    "rows": "trained rows of tokens",
    "scale": "IA3",
    "shift": "a bias in the adapter",
    "vera": "VeRA",
    "whole": "a fully trained module",
}


@dataclass(frozen=True)
class VllmAdapter:
    """An adapter rewritten for vLLM: its rank, and the changes in words."""

    rank: int
    changes: tuple[str, ...]

    @property
    def said(self) -> str:
        """Return the command that serves it."""
        rank_option = f" --max-lora-rank {self.rank}" if self.rank > _DEFAULT_MAX_RANK else ""
        return f"vllm serve BASE --enable-lora{rank_option} --lora-modules NAME=DIR"


def refuse_unservable(path: Path, edits: Edits) -> None:
    """Raise UserError with everything that vLLM rejects, each with its place and a fix."""
    problems = list(_unserved_problems(path, edits))
    if problems:
        raise UserError(problems)


def _unserved_problems(path: Path, edits: Edits) -> Iterator[Problem]:
    fix = _MERGE_HINT.format(path=path)
    for kind, description in _UNSERVED_KINDS.items():
        names = [name for name, weight_edits in edits.items() if any(edit.kind == kind for edit in weight_edits)]
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield Problem(str(path), f"{description} ({names[0]}{others})", "plain LoRA, which vLLM serves", fix)


def write_for_vllm(
    adapter: Path,
    config: Mapping[str, object],
    edits: Edits,
    tensors: Mapping[str, TensorEntry],
    out: Path,
    *,
    parameters: Collection[str],
) -> VllmAdapter:
    """Write configuration and weights into `out`, a folder that exists; `parameters` are all of the base's.

    Scales are folded into B, ranks padded with zeros to the largest, both exact but for one rounding of B.
    Raises UserError for what vLLM rejects.
    """
    edits = {
        name: tuple(edit for edit in weight_edits if not edit.is_table_copy) for name, weight_edits in edits.items()
    }
    edits = {name: weight_edits for name, weight_edits in edits.items() if weight_edits}
    refuse_unservable(adapter, edits)
    pairs = {name.removesuffix(".weight"): weight_edits[0] for name, weight_edits in edits.items()}
    rank = max(tensors[edit.tensors["A"]].shape[0] for edit in pairs.values())
    write_plain_lora(
        out, config, list(pairs), lambda name: _scaled_pair(pairs[name], tensors), rank=rank, parameters=parameters
    )
    return VllmAdapter(rank, tuple(_rewrite_notes(config, pairs, tensors, rank)))


def _scaled_pair(edit: Edit, tensors: Mapping[str, TensorEntry]) -> LoraPair:
    """Return A and B with the scale in B."""
    a, b = (tensors[edit.tensors[side]].read() for side in "AB")
    if "E" in edit.tensors:  # AdaLoRA's singular values
        a = (a.float() * tensors[edit.tensors["E"]].read().float()).to(a.dtype)
    return a, b if edit.scale == 1.0 else (b.float() * edit.scale).to(b.dtype)


def _rewrite_notes(
    config: Mapping[str, object], pairs: Mapping[str, Edit], tensors: Mapping[str, TensorEntry], rank: int
) -> Iterator[str]:
    scales = sorted({edit.scale for edit in pairs.values()})
    if scales != [1.0]:
        scale_text = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        yield f"scales of {scale_text} are folded into B"
    ranks = sorted({tensors[edit.tensors["A"]].shape[0] for edit in pairs.values()})
    if len(ranks) > 1:
        yield f"ranks of {ranks[0]} to {rank} are padded with zeros to {rank}"
    if config.get("use_rslora"):
        yield "rsLoRA is written as plain LoRA"
    if not isinstance(config.get("target_modules"), list):
        yield "the modules are listed by name"
