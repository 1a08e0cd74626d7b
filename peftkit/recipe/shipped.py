"""The recipes that come with peftkit: found by name and listed; and the text of a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peftkit.archs import EMBEDDED, KNOWN, family_of
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.recipe.document import INVALID_CHARS, dump_text
from peftkit.recipe.paths import path_exists, shipped_folder


@dataclass(frozen=True)
class ShippedRecipe:
    """One shipped recipe: its name, its file, and the text of its first comment line."""

    name: str
    path: Path
    title: str


def list_shipped() -> list[ShippedRecipe]:
    """Return all shipped recipes, by name."""
    recipes = []
    for path in sorted(shipped_folder().glob("*.yaml")):
        comments = [
            line[1:].strip()
            for line in path.read_text(encoding="utf-8").splitlines()[:3]
            if line.startswith("#") and "yaml-language-server" not in line
        ]
        recipes.append(ShippedRecipe(path.stem, path, comments[0] if comments else ""))
    return recipes


def find_shipped(name: str) -> Path | None:
    """Return the file of a shipped recipe; None if `name` is none, or a file of that name exists here."""
    if path_exists(Path(name)) or "/" in name or name.endswith((".yaml", ".yml")):
        return None
    path = shipped_folder() / f"{name}.yaml"
    return path if path_exists(path) else None


def show_shipped(name: str) -> str:
    """Return the text of a shipped recipe. Raises UserError for an unknown name."""
    by_name = {recipe.name: recipe for recipe in list_shipped()}
    if name not in by_name:
        raise UserError(Problem("recipes show", repr(name), "a shipped recipe", did_you_mean(name, list(by_name))))
    return by_name[name].path.read_text(encoding="utf-8")


_NEW_RECIPE = """\
# {method} of {base}. Completion in your editor: peftkit schema > recipe.schema.json
# yaml-language-server: $schema=recipe.schema.json
base: {quoted}
method:
  name: {method}
data:
{data}
  eval: 5%              # held out: a share of train, or a file
train:
  epochs: 1             # passes over the data; what is left out here is decided, with reasons: --dry-run
"""
_DATA = {
    "chats": """\
  train: sample:chats   # 600 chats that come with peftkit, to try it. Then yours: a file, a folder, a URL or a hub
                        # dataset of chats, prompts with completions, instructions or texts; columns are detected""",
    "classes": """\
  train: sample:classes         # 10,003 texts with classes that come with peftkit, to try it. Then yours
  columns: {label: category}    # our name of a column: the file's name of it""",
}


def new_recipe(base: str, method: str) -> str:
    """Return the text of a new recipe for a model and a method, on data that the model can learn from.

    Raises UserError for an invalid base name.
    """
    if INVALID_CHARS.search(base):
        raise UserError(Problem("recipes new", repr(base), "the name of a model"))
    quoted = dump_text({"base": base}).removeprefix("base: ").strip()
    embedded = EMBEDDED.get(base.removeprefix("embedded:"))
    config = embedded.config if embedded else KNOWN.get(base, {})
    file = Path(base) / "config.json"
    if path_exists(file):
        with suppress(ValueError, OSError):
            config = json.loads(file.read_text(encoding="utf-8"))
    family = family_of(str(config.get("model_type"))) if isinstance(config, Mapping) else None
    writes = family is None or not {"causal-lm", "seq2seq"}.isdisjoint(family.heads)
    data = _DATA["chats" if writes else "classes"]
    return _NEW_RECIPE.format(base=" ".join(base.split()), quoted=quoted, method=method, data=data)
