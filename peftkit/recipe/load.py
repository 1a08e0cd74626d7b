"""From files, overrides and dicts to a `Recipe`, remembering where every value came from."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftkit.errors import Problem, UserError
from peftkit.recipe.document import MAX_DEPTH, NO_TEXT, Document, Key, dotted, parse_value, read_document
from peftkit.recipe.explain import explain, show
from peftkit.recipe.paths import anchored
from peftkit.recipe.schema import Recipe
from peftkit.recipe.shipped import find_shipped

_SHORT_FORMS = {"base": "id", "method": "name"}
_MAX_CHAIN = 50


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
    told = dotted(key)
    for length in range(len(key), 0, -1):
        if key[:length] in sources:
            return f"{sources[key[:length]].where} {told}"
    return f"{name} {told}".strip()


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
) -> None:
    """Lay `layer` over `into`. A section that names another method replaces the inherited one."""
    replaced = set(_lay(into, layer))
    for known in [k for k in sources if any(k[:length] in replaced for length in range(1, len(k) + 1))]:
        del sources[known]
    sources.update({known: source for known, source in layer_sources.items() if known[0] in layer})


def _lay(into: dict[str, Any], layer: Mapping[str, Any], key: Key = ()) -> Iterator[Key]:
    """Lay the values of `layer` over those of `into`. Gives the keys whose old values went."""
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
            yield from _lay(old, value, path)
        else:
            yield path
            into[name] = deepcopy(value)


def _chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Document, Path]]:
    """The recipe and what it extends, the oldest ancestor first."""
    here = path.resolve()
    if here in seen:
        circle = " -> ".join(str(p.name) for p in (*seen[seen.index(here) :], here))
        raise UserError(Problem(str(path), f"a circle of extends: {circle}", "recipes that end somewhere"))
    if len(seen) == _MAX_CHAIN:
        raise UserError(Problem(str(path), f"more than {_MAX_CHAIN} recipes that extend each other", "fewer"))
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
    if not os.path.isfile(target):  # noqa: PTH113  Path's raises for names that no file can have
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
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        where = f"command line {NO_TEXT.sub('?', dotted(tuple(parts)))}"
        if not equals or not all(parts):
            problems.append(Problem("command line", show(text), "key=value", "for example method.rank=32"))
            continue
        if len(parts) > MAX_DEPTH:
            problems.append(Problem("command line", f"a key of {len(parts)} parts", "a key of the recipe"))
            continue
        try:
            typed = parse_value(value)
        except UserError as error:
            problems.append(Problem(where, show(value), "a YAML value", error.problems[0].got))
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
    if len(key) > MAX_DEPTH:
        raise UserError(Problem("recipe", "values nested too deep", "a short recipe"))
    if not isinstance(data, Mapping):
        return [key]
    return [key, *(k for name, value in data.items() for k in _keys(value, (*key, name)))]


def _no_text(data: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """(key, what it is) for texts that no file and no terminal takes: NUL, half of a surrogate pair."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from _no_text(str(name), key)
            yield from _no_text(value, (*key, name))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _no_text(value, (*key, number))
    elif isinstance(data, str) and (found := NO_TEXT.search(data)):
        yield key, f"the character U+{ord(found[0]):04X} in {show(data)}"


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
        if NO_TEXT.search(str(source)):
            raise UserError(Problem(repr(str(source)), "a name that no file can have", "a recipe"))
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
        text = chain[-1][0].text
    typed, problems = _overrides(overrides)
    if problems:
        raise UserError(problems)
    _long_form(typed, {})
    command = Source("command line", "command line", Path.cwd(), 1_000_000)
    _merge(data, typed, sources, {k: command for k in _keys(typed) if k})
    _drop_overruled_epochs(data, sources)
    if broken := list(_no_text(data)):
        raise UserError(Problem(_where(sources, name, key), got, "text") for key, got in broken)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, data, lambda key: _where(sources, name, key))) from None

    def folder(*key: str) -> Path:
        return sources[key].folder if key in sources else Path.cwd()

    return LoadedRecipe(anchored(recipe, folder), sources, name, text)
