"""The rank of an adapter, where the recipe leaves it open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftkit.archs import ModelShape
from peftkit.methods.lora import LoraOptions
from peftkit.recipe import LoadedRecipe

_RANKS = (64, 32, 16)
_HEAD_REASON = "a new head shares its learning rate and wants the higher one of a lower rank (docs/quality.md)"
_REASON = "at its own learning rate no lower one ended better wherever it was measured (docs/quality.md)"


def preferred_rank(shape: ModelShape) -> int:
    """Return the rank where memory allows it: at most half the width, where A and B are as large as a square layer.

    A new head shares the adapter's learning rate and wants the higher one of a lower rank.
    """
    rank = _RANKS[-1] if shape.task_head.modules else _RANKS[0]
    return min(rank, max(1, shape.dims.hidden // 2))


def settled_ranks(loaded: LoadedRecipe, shape: ModelShape) -> Iterator[tuple[LoadedRecipe, str]]:
    """Yield the recipe with each rank that `rank: auto` may become, and why; as it is, where nothing is open.

    The first that fits is to be taken.
    """
    method = loaded.recipe.method
    if not isinstance(method, LoraOptions) or method.rank != "auto":
        yield loaded, ""
        return
    reason = _HEAD_REASON if shape.task_head.modules else _REASON
    for number, rank in enumerate(dict.fromkeys(min(rank, preferred_rank(shape)) for rank in _RANKS)):
        settled = loaded.recipe.model_copy(update={"method": method.model_copy(update={"rank": rank})})
        yield replace(loaded, recipe=settled), reason if number == 0 else "a larger one does not fit with a margin"
