"""From files, overrides and dicts to a `Recipe`, remembering where every value came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftkit.errors import Problem, UserError
from peftkit.recipe.document import Document, Key, parse_value, read_document
from peftkit.recipe.explain import explain
from peftkit.recipe.paths import anchored
from peftkit.recipe.schema import Recipe
from peftkit.recipe.shipped import find_shipped

_SHORT_FORMS = {"base": "id", "method": "name"}


@dataclass(frozen=True)
class Source:
    """Where a value was written. `folder` is what its relative paths are relative to."""

    kind: str  # "recipe" | "extends" | "command line" | "python"
    where: str
    folder: Path
    rank: int = 0  # later layers have higher ranks and lie over earlier ones

    def __str__(self) -> str:
        return {"recipe": self.where, "extends": f"{self.where} (extends)"}.get(self.kind, self.kind)


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, the source of every value that was written, and the text as given."""

    recipe: Recipe
    sources: Mapping[Key, Source]
    name: str
    text: str

    def source(self, key: Key) -> Source | None:
        """Where a key was written; None for a default."""
        return self.sources.get(key)

    def where(self, key: Key) -> str:
        """'recipes/x.yaml:7 method.rank' for messages."""
        return _where(self.sources, self.name, key)


def _where(sources: Mapping[Key, Source], name: str, key: Key) -> str:
    dotted = ".".join(str(part) for part in key)
    for length in range(len(key), 0, -1):
        if key[:length] in sources:
            return f"{sources[key[:length]].where} {dotted}"
    return f"{name} {dotted}".strip()


def _long_form(data: dict[str, Any], lines: dict[Key, int]) -> None:
    """`base: gpt2` becomes `base: {id: gpt2}`, so that layers of a recipe can be merged key by key."""
    for key, inner in _SHORT_FORMS.items():
        if isinstance(data.get(key), str):
            data[key] = {inner: data[key]}
            lines[(key, inner)] = lines.get((key,), 1)


def _merge(
    into: dict[str, Any],
    layer: Mapping[str, Any],
    sources: dict[Key, Source],
    layer_sources: Mapping[Key, Source],
    key: Key = (),
) -> None:
    """Lay `layer` over `into`. A section that names another method replaces the inherited one."""
    for name, value in layer.items():
        path = (*key, name)
        old = into.get(name)
        other_method = (
            path == ("method",)
            and isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("name", old.get("name")) != old.get("name")
        )
        if isinstance(value, Mapping) and isinstance(old, dict) and not other_method:
            _merge(old, value, sources, layer_sources, path)
        else:
            for known in [k for k in sources if k[: len(path)] == path]:
                del sources[known]
            into[name] = deepcopy(value)
        for known, source in layer_sources.items():
            if known[: len(path)] == path:
                sources[known] = source


def _chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Document, Path]]:
    """The recipe and what it extends, the oldest ancestor first."""
    here = path.resolve()
    if here in seen:
        circle = " -> ".join(str(p.name) for p in (*seen[seen.index(here) :], here))
        raise UserError(Problem(str(path), f"a circle of extends: {circle}", "recipes that end somewhere"))
    document = read_document(path)
    parent = document.data.pop("extends", None)
    if parent is None:
        return [(document, path)]
    where = f"{path}:{document.lines[('extends',)]} extends"
    if not isinstance(parent, str):
        raise UserError(
            Problem(where, repr(parent), "the path of a recipe", "for example extends: base.yaml")
        )
    target = path.parent / parent
    if not target.is_file():
        raise UserError(
            Problem(
                where,
                f"{parent!r}, which is not there",
                "a recipe file",
                f"paths are relative to {path.parent}",
            )
        )
    return [*_chain(target, (*seen, here)), (document, path)]


def _overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    found: dict[str, Any] = {}
    problems = []
    for text in overrides:
        dotted, equals, value = text.partition("=")
        parts = dotted.strip().split(".")
        where = f"command line {dotted}"
        if not equals or not all(parts):
            problems.append(Problem("command line", repr(text), "key=value", "for example method.rank=32"))
            continue
        try:
            typed = parse_value(value)
        except Exception as error:  # noqa: BLE001  whatever YAML says of it, the value is the user's to mend
            problems.append(Problem(where, repr(value), "a YAML value", str(error).splitlines()[0]))
            continue
        section = found
        for part in parts[:-1]:
            if not isinstance(section.get(part), dict):
                short = _SHORT_FORMS.get(part)
                section[part] = {short: section[part]} if short and part in section else {}
            section = section[part]
        last, short = parts[-1], _SHORT_FORMS.get(parts[-1])
        if len(parts) == 1 and short and isinstance(section.get(last), dict) and isinstance(typed, str):
            section[last][short] = typed
        else:
            section[last] = typed
    return found, problems


def _drop_overruled_epochs(data: dict[str, Any], sources: dict[Key, Source]) -> None:
    """`max_steps` of a later layer overrules `epochs` of an earlier one: the recipe then has no epochs."""
    train = data.get("train")
    epochs, steps = (sources.get(("train", key)) for key in ("epochs", "max_steps"))
    if (
        isinstance(train, dict)
        and epochs
        and steps
        and epochs.rank < steps.rank
        and train["max_steps"] is not None
    ):
        del train["epochs"], sources[("train", "epochs")]


def _keys(data: Any, key: Key = ()) -> list[Key]:
    if not isinstance(data, Mapping):
        return [key]
    return [key, *(k for name, value in data.items() for k in _keys(value, (*key, name)))]


def load(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe from a file, a shipped recipe's name, a dict or a `Recipe`, with overrides on top.

    Raises UserError with every problem found, each with file, line and key.
    """
    data: dict[str, Any] = {}
    sources: dict[Key, Source] = {}
    text = ""
    if isinstance(source, Recipe | Mapping):
        name = "recipe"
        given = (
            source.model_dump(exclude_unset=True) if isinstance(source, Recipe) else deepcopy(dict(source))
        )
        _long_form(given, {})
        python = Source("python", "python", Path.cwd())
        _merge(data, given, sources, {k: python for k in _keys(given) if k})
    else:
        path = find_shipped(str(source)) or Path(source)
        name = str(path)
        chain = _chain(path)
        for rank, (document, where) in enumerate(chain):
            _long_form(document.data, document.lines)
            kind = "recipe" if where == path else "extends"
            layer = {
                k: Source(kind, f"{where}:{line}", where.parent, rank) for k, line in document.lines.items()
            }
            _merge(data, document.data, sources, layer)
        text = path.read_text(encoding="utf-8-sig")
    typed, problems = _overrides(overrides)
    if problems:
        raise UserError(problems)
    _long_form(typed, {})
    command = Source("command line", "command line", Path.cwd(), 1_000_000)
    _merge(data, typed, sources, {k: command for k in _keys(typed) if k})
    _drop_overruled_epochs(data, sources)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, data, lambda key: _where(sources, name, key))) from None

    def folder(*key: str) -> Path:
        return sources[key].folder if key in sources else Path.cwd()

    return LoadedRecipe(anchored(recipe, folder), sources, name, text)
