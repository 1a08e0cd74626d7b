"""Paths in a recipe are relative to the file that states them; on the command line, to the current folder."""

from __future__ import annotations

import os.path
from collections.abc import Callable
from pathlib import Path

from peftkit.recipe.schema import AnySource, Recipe, Source

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
    given = data.train if isinstance(data.train, list) else [data.train]
    update: dict[str, object] = {"train": [_anchored(source, folder("data", "train")) for source in given]}
    if isinstance(data.eval, str | Source):
        update["eval"] = _anchored(data.eval, folder("data", "eval"))
    if data.chat.template is not None:
        template = _absolute(data.chat.template, folder("data", "chat", "template"))
        update["chat"] = data.chat.model_copy(update={"template": template})
    return recipe.model_copy(update={"base": base, "data": data.model_copy(update=update)})


def _anchored(source: AnySource, folder: Path) -> AnySource:
    """The source with an absolute path, where it is a path."""
    if isinstance(source, Source):
        return source.model_copy(update={"path": _anchored(source.path, folder)})
    return _absolute(source, folder) if is_data_path(source) else source
