"""Loading a `Recipe` from files, overrides and dicts, with the source of every value."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from peftkit.errors import Problem, UserError, nearest
from peftkit.recipe.document import (
    INVALID_CHARS,
    MAX_DEPTH,
    Document,
    Key,
    dotted,
    dump_value,
    parse_value,
    plain_value,
    read_document,
)
from peftkit.recipe.explain import show_value, validation_problems
from peftkit.recipe.paths import absolute_path, path_exists, with_absolute_paths
from peftkit.recipe.schema import SCHEDULE_KEYS, Recipe
from peftkit.recipe.shipped import find_shipped, list_shipped
from peftkit.recipe.start import adapter_folder, differences, is_complete, settings_of

_SHORT_FORMS = {"base": "id", "method": "name"}
_MAX_CHAIN = 50


@dataclass(frozen=True)
class ValueSource:
    """The place where a value was written. `folder` is what its relative paths are relative to."""

    kind: str  # "recipe" | "extends" | "command line" | "python" | "start_from"
    where: str
    folder: Path
    rank: int = 0  # later layers have higher ranks and lie over earlier ones

    def __str__(self) -> str:
        return {"recipe": self.where, "extends": f"{self.where} (extends)"}.get(self.kind, self.kind)


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, the source of every value that was written, and the text as given."""

    recipe: Recipe
    sources: Mapping[Key, ValueSource]
    name: str
    text: str

    def source(self, key: Key) -> ValueSource | None:
        """Return the source of a key; None for a default."""
        return self.sources.get(key)

    def where(self, key: Key) -> str:
        """Return 'recipes/x.yaml:7 method.rank' for messages."""
        return _where(self.sources, self.name, key)


def _where(sources: Mapping[Key, ValueSource], name: str, key: Key) -> str:
    key_text = dotted(key)
    for length in range(len(key), 0, -1):
        if key[:length] in sources:
            return f"{sources[key[:length]].where} {key_text}"
    return f"{name} {key_text}".strip()


def _expand_short_forms(data: dict[str, Any], lines: dict[Key, int]) -> None:
    """Expand `base: gpt2` to `base: {id: gpt2}` in place, so that layers merge key by key."""
    for key, inner in _SHORT_FORMS.items():
        if isinstance(data.get(key), str):
            data[key] = {inner: data[key]}
            lines[(key, inner)] = lines.get((key,), 1)


def _merge(
    target: dict[str, Any],
    layer: Mapping[str, object],
    sources: dict[Key, ValueSource],
    layer_sources: Mapping[Key, ValueSource],
) -> None:
    """Lay `layer` over `target`. A section that names another method replaces the inherited one."""
    replaced = set(_overlay(target, layer))
    for key in [k for k in sources if any(k[:length] in replaced for length in range(1, len(k) + 1))]:
        del sources[key]
    sources.update({key: source for key, source in layer_sources.items() if key[0] in layer})


def _overlay(target: dict[str, Any], layer: Mapping[str, object], key: Key = ()) -> Iterator[Key]:
    """Lay the values of `layer` over those of `target`. Yields the keys whose old values were replaced."""
    for name, value in layer.items():
        path = (*key, name)
        current = target.get(name)
        other_method = (
            path == ("method",)
            and isinstance(value, Mapping)
            and isinstance(current, Mapping)
            and value.get("name", current.get("name")) != current.get("name")
        )
        if isinstance(value, Mapping) and isinstance(current, dict) and not other_method:
            yield from _overlay(current, value, path)
        else:
            yield path
            target[name] = deepcopy(value)


def _extends_chain(path: Path, ancestors: tuple[Path, ...] = ()) -> list[tuple[Document, Path]]:
    """Return the recipe and those that it extends, oldest ancestor first. Raises UserError for a circle."""
    resolved = path.resolve()
    if resolved in ancestors:
        circle = " -> ".join(str(p.name) for p in (*ancestors[ancestors.index(resolved) :], resolved))
        raise UserError(Problem(str(path), f"a circle of extends: {circle}", "extends without a circle"))
    if len(ancestors) == _MAX_CHAIN:
        raise UserError(Problem(str(path), f"more than {_MAX_CHAIN} recipes that extend each other", "fewer"))
    document = read_document(path)
    parent = document.data.pop("extends", None)
    if parent is None:
        return [(document, path)]
    where = f"{path}:{document.lines[('extends',)]} extends"
    if not isinstance(parent, str):
        raise UserError(Problem(where, repr(parent), "the path of a recipe", "for example extends: base.yaml"))
    target = path.parent / parent
    if not os.path.isfile(target):  # noqa: PTH113  Path's raises for names that no file can have
        raise UserError(
            Problem(where, f"{parent!r}, which does not exist", "a recipe file", f"paths are relative to {path.parent}")
        )
    return [*_extends_chain(target, (*ancestors, resolved)), (document, path)]


def override_texts(overrides: str | Sequence[str] | Mapping[str, Any] | None) -> list[str]:
    """Return overrides as key=value texts: of one text, of several, or of a mapping of keys to values.

    Example: {"train": {"epochs": 2}, "base": "gpt2"} -> ["train.epochs=2", "base=gpt2"].
    """
    if not overrides:
        return []
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return list(overrides)
    texts = []
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            texts += [f"{key}.{text}" for text in override_texts(value)]
        else:
            try:
                texts.append(f"{key}={dump_value(plain_value(value))}")
            except yaml.YAMLError:
                got = f"a {type(value).__name__}"
                raise UserError(Problem(f"overrides {key}", got, "a value that YAML can hold")) from None
    return texts


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    values: dict[str, Any] = {}
    problems = []
    for text in overrides:
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        where = f"command line {INVALID_CHARS.sub('?', dotted(tuple(parts)))}"
        if not equals or not all(parts):
            problems.append(Problem("command line", show_value(text), "key=value", "for example method.rank=32"))
            continue
        if len(parts) > MAX_DEPTH:
            problems.append(Problem("command line", f"a key of {len(parts)} parts", "a key of the recipe"))
            continue
        try:
            parsed = parse_value(value)
        except UserError as error:
            problems.append(Problem(where, show_value(value), "a YAML value", error.problems[0].got))
            continue
        section = values
        for part in parts[:-1]:
            if not isinstance(section.get(part), dict):
                short = _SHORT_FORMS.get(part)
                section[part] = {short: section[part]} if short and part in section else {}
            section = section[part]
        last, short = parts[-1], _SHORT_FORMS.get(parts[-1])
        if len(parts) == 1 and short and isinstance(section.get(last), dict) and isinstance(parsed, str):
            section[last][short] = parsed
        else:
            section[last] = parsed
    return values, problems


def _all_keys(data: object, key: Key = ()) -> list[Key]:
    if len(key) > MAX_DEPTH:
        raise UserError(Problem("recipe", "values nested too deep", "a short recipe"))
    if not isinstance(data, Mapping):
        return [key]
    return [key, *(k for name, value in data.items() for k in _all_keys(value, (*key, name)))]


def _invalid_texts(data: object, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield (key, problem) for texts that no file and no terminal accepts: NUL, half of a surrogate pair."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from _invalid_texts(str(name), key)
            yield from _invalid_texts(value, (*key, name))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _invalid_texts(value, (*key, number))
    elif isinstance(data, str) and (match := INVALID_CHARS.search(data)):
        yield key, f"the character U+{ord(match[0]):04X} in {show_value(data)}"


def _drop_overruled(data: dict[str, Any], sources: dict[Key, ValueSource]) -> None:
    """Remove settings of earlier layers that a setting of a later one replaces, though its key is another.

    `max_steps` replaces `epochs`, either warm-up the other, and a schedule what it does not take.
    """
    train = data.get("train")
    schedule = train.get("schedule") if isinstance(train, dict) else None
    epochs, warmup, kind = ("train", "epochs"), ("train", "schedule", "warmup"), ("train", "schedule", "kind")
    warmup_steps = ("train", "schedule", "warmup_steps")
    pairs = [(epochs, ("train", "max_steps")), (warmup, warmup_steps), (warmup_steps, warmup)]
    if isinstance(schedule, dict):
        other_kinds = (key for key, takers in SCHEDULE_KEYS.items() if str(schedule.get("kind")) not in takers)
        pairs += [(("train", "schedule", key), kind) for key in other_kinds]
    for old, new in pairs:
        section = train if len(old) == 2 else schedule
        earlier, later = sources.get(old), sources.get(new)
        is_overruled = earlier and later and earlier.rank < later.rank
        if isinstance(section, dict) and is_overruled and section.get(new[-1]) is not None and old[-1] in section:
            del section[old[-1]], sources[old]


def _take_from_start(data: dict[str, Any], sources: dict[Key, ValueSource], name: str) -> None:
    """Fill in what the recipe does not say of base and method from the adapter that it starts from.

    A run's own recipe says all of it, and needs the adapter no more. Raises UserError where the recipe says
    something else than the adapter does.
    """
    path, method, base = data.get("start_from"), data.get("method"), data.get("base")
    if not (isinstance(path, str) and isinstance(method, dict | None) and isinstance(base, dict | None)):
        return  # what is wrong with them is told by the schema
    if is_complete(method) and "id" in (base or {}):
        return
    where = _where(sources, name, ("start_from",))
    folder = adapter_folder(Path(absolute_path(path, sources[("start_from",)].folder)), where)
    given = method or {}
    sections = settings_of(folder, where, given.get("name"))
    problems = [
        Problem(
            _where(sources, name, ("method", key)), show_value(given[key]), show_value(sections["method"][key]), fix
        )
        for key in differences(given, sections["method"])
        if (fix := "leave it out: the adapter of start_from has its own")
    ]
    if problems:
        raise UserError(problems)
    taken = ValueSource("start_from", str(folder / "adapter_config.json"), Path.cwd())
    for section, values in sections.items():
        if "id" in (base or {}) and section == "base":
            continue  # another copy of it: what it is is compared
        target = data[section] = data.get(section) or {}
        for key, value in values.items():
            if key not in target:
                target[key] = value
                sources[(section, key)] = taken


def load(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe from a file, a shipped recipe's name, a dict or a `Recipe`, with overrides on top.

    Raises UserError with every problem found, each with file, line and key.
    """
    data: dict[str, Any] = {}
    sources: dict[Key, ValueSource] = {}
    text = ""
    if isinstance(source, Recipe | Mapping):
        name = "recipe"
        given = source.model_dump(exclude_unset=True) if isinstance(source, Recipe) else deepcopy(dict(source))
        values = {key: plain_value(value) for key, value in given.items()}
        _expand_short_forms(values, {})
        python = ValueSource("python", "python", Path.cwd())
        _merge(data, values, sources, {k: python for k in _all_keys(values) if k})
    else:
        if INVALID_CHARS.search(str(source)):
            raise UserError(Problem(repr(str(source)), "a name that no file can have", "a recipe"))
        path = find_shipped(str(source)) or Path(source)
        name = str(path)
        if not path_exists(path) and (alike := nearest(Path(source).stem, [recipe.name for recipe in list_shipped()])):
            expected = "a recipe, or the name of a shipped one"
            raise UserError(Problem(name, "no such file", expected, f"did you mean {alike[0]}?"))
        chain = _extends_chain(path)
        for rank, (document, where) in enumerate(chain):
            _expand_short_forms(document.data, document.lines)
            kind = "recipe" if where == path else "extends"
            layer = {k: ValueSource(kind, f"{where}:{line}", where.parent, rank) for k, line in document.lines.items()}
            _merge(data, document.data, sources, layer)
        text = chain[-1][0].text
    override_values, problems = _parse_overrides(overrides)
    if problems:
        raise UserError(problems)
    _expand_short_forms(override_values, {})
    command = ValueSource("command line", "command line", Path.cwd(), 1_000_000)
    _merge(data, override_values, sources, {k: command for k in _all_keys(override_values) if k})
    _drop_overruled(data, sources)
    if invalid := list(_invalid_texts(data)):
        raise UserError(Problem(_where(sources, name, key), got, "text") for key, got in invalid)
    _take_from_start(data, sources, name)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(validation_problems(error, data, lambda key: _where(sources, name, key))) from None

    def folder(*key: str) -> Path:
        return sources[key].folder if key in sources else Path.cwd()

    return LoadedRecipe(with_absolute_paths(recipe, folder), sources, name, text)
