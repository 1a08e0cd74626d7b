"""Inspection of a model: a hub id, a folder, an embedded model, a GGUF file, or a config.json alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peftkit.archs.held import held_format
from peftkit.data.read import read_rows
from peftkit.model.base.gguf import read_header_config
from peftkit.model.base.locate import locate_base
from peftkit.model.base.remote_code import require_pinned_commit
from peftkit.model.base.shape import infer_base_shape
from peftkit.plan.inspection import Inspection, make_inspection
from peftkit.recipe.paths import is_model_path

_CHARACTERS_PER_TOKEN = 4  # of English text, for tokenizers of today


def count_tokens(path: Path) -> int:
    """Estimate the number of tokens in a data file from its characters; no tokenizer is loaded."""
    rows = read_rows([str(path)], where="--data")
    num_characters = sum(len(str(value)) for row in rows for value in row.fields.values() if value)
    return num_characters // _CHARACTERS_PER_TOKEN


def inspect(
    model: str, *, data: Path | None = None, trust_remote_code: bool = False, revision: str | None = None
) -> Inspection:
    """Inspect a model: its sizes, its memory, and the methods that can train it. No weights are loaded.

    Code that comes with a model runs only when trusted, and from the hub only at a commit. Raises UserError
    for a model that does not exist, is no text model, or has an invalid configuration.
    """
    name = str(Path(model).expanduser().resolve()) if is_model_path(model, Path.cwd()) else model
    if trust_remote_code:
        require_pinned_commit(name, revision, where=model, remedy="--revision COMMIT")
    base = locate_base(name, revision=revision, where=model, need_weights=False, shapes_alone=True)
    if base.kind == "gguf" and base.path is not None:
        base = replace(base, config=read_header_config(base.path, model))
    shape = infer_base_shape(
        base,
        task="auto",
        data_format=None,
        num_labels=0,
        trust_remote_code=trust_remote_code,
        where=model,
        revision=revision,
    )
    tokens = count_tokens(data) if data is not None else None
    return make_inspection(model, shape, data_tokens=tokens, held=held_format(base.config or {}))
