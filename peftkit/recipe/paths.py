"""Paths in a recipe are relative to the file that states them; on the command line, to the current folder."""

from __future__ import annotations

import os.path
from collections.abc import Callable
from pathlib import Path

from peftkit.recipe.schema import Recipe

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def is_data_path(text: str) -> bool:
    """Whether a data source is a file rather than a hub id."""
    return text.lower().endswith(DATA_SUFFIXES) or text.startswith((".", "/", "~"))


def is_model_path(text: str, folder: Path) -> bool:
    """Whether a base is a folder or file rather than a hub id or an embedded name."""
    if text.startswith("embedded:"):
        return False
    return text.endswith(".gguf") or text.startswith((".", "/", "~")) or (folder / text).exists()


def _absolute(text: str, folder: Path) -> str:
    return str((folder / os.path.expanduser(text)).resolve())  # noqa: PTH111  Path's raises for unknown users


def anchored(recipe: Recipe, folder: Callable[..., Path]) -> Recipe:
    """The recipe with every path made absolute; `folder(*key)` is what a key's paths are relative to."""
    base, data = recipe.base, recipe.data
    if is_model_path(base.id, folder("base", "id")):
        base = base.model_copy(update={"id": _absolute(base.id, folder("base", "id"))})
    train = [data.train] if isinstance(data.train, str) else data.train
    train = [_absolute(t, folder("data", "train")) if is_data_path(t) else t for t in train]
    update: dict[str, object] = {"train": train}
    if isinstance(data.eval, str) and is_data_path(data.eval):
        update["eval"] = _absolute(data.eval, folder("data", "eval"))
    return recipe.model_copy(update={"base": base, "data": data.model_copy(update=update)})
