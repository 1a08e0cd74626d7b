"""An adapter as vLLM serves it: plain LoRA of one rank and one scale, with its modules listed by name.

What vLLM takes and refuses is told at the first request, after the server has loaded the model; it is told
here instead. After vLLM's `PEFTHelper` (vllm/lora/peft_helper.py) and its page on LoRA adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.edits import Edit, Edits
from peftkit.ship.files.tensors import Entry
from peftkit.ship.merge.plain_lora import Pair, write_plain

_SERVED_RANK = 16  # vLLM's own --max-lora-rank, unless it is told another
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
    write_plain(
        out, config, list(pairs), lambda name: _pair(pairs[name], tensors), rank=rank, parameters=parameters
    )
    return Rewritten(rank, tuple(_changes(config, pairs, tensors, rank)))


def _pair(edit: Edit, tensors: Mapping[str, Entry]) -> Pair:
    """A and B with the scale in B."""
    a, b = (tensors[edit.tensors[side]].read() for side in "AB")
    if "E" in edit.tensors:  # AdaLoRA's singular values
        a = (a.float() * tensors[edit.tensors["E"]].read().float()).to(a.dtype)
    return a, b if edit.scale == 1.0 else (b.float() * edit.scale).to(b.dtype)


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
