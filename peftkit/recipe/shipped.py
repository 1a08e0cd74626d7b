"""The recipes that come with peftkit: found by name and listed; and the text of a new one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.recipe.document import INVALID_CHARS, dump_text
from peftkit.recipe.paths import path_exists

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder() -> Path:
    """Return `recipes/` of a clone, or the copy inside an installed package."""
    installed = _PACKAGE / "shipped_recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


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
  train: train.jsonl   # chat, prompt-completion, instruction or text; the format is detected
  eval: 5%             # a share of train, or a file
train:
  epochs: 3
"""


def new_recipe(base: str, method: str) -> str:
    """Return the text of a new recipe for a model and a method. Raises UserError for an invalid base name."""
    if INVALID_CHARS.search(base):
        raise UserError(Problem("recipes new", repr(base), "the name of a model"))
    quoted = dump_text({"base": base}).removeprefix("base: ").strip()
    return _NEW_RECIPE.format(base=" ".join(base.split()), quoted=quoted, method=method)
