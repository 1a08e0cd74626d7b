"""Validation errors as problems that a person can fix: file, line, key, got, expected, nearest key."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from peftkit.errors import Problem, did_you_mean
from peftkit.methods import METHODS
from peftkit.recipe.document import parse_value
from peftkit.recipe.schema import Recipe
from peftkit.recipe.vocabulary import translate_key
from peftkit.units import shorten

Path = tuple[str | int, ...]
_EXPECTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "int_type": lambda c: "an integer",
    "int_from_float": lambda c: "an integer",
    "float_type": lambda c: "a number",
    "float_parsing": lambda c: "a number",
    "finite_number": lambda c: "a finite number",
    "bool_type": lambda c: "true or false",
    "string_type": lambda c: "text",
    "list_type": lambda c: "a list",
    "dict_type": lambda c: "a mapping",
    "model_type": lambda c: "a mapping",
    "model_attributes_type": lambda c: "a mapping",
    "literal_error": lambda c: str(c["expected"]).replace("'", ""),
    "greater_than": lambda c: f"a number greater than {c['gt']:g}",
    "greater_than_equal": lambda c: f"a number of at least {c['ge']:g}",
    "less_than": lambda c: f"a number less than {c['lt']:g}",
    "less_than_equal": lambda c: f"a number of at most {c['le']:g}",
    "too_short": lambda c: f"at least {c['min_length']} items",
    "value_error": lambda c: str(c["error"]),
}


def show_value(value: object) -> str:
    """Return a value as an error shows it: text in quotes, everything short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, int) and abs(value) >= 10**60:
        return f"a number of about {value.bit_length() * 0.30103:,.0f} digits"
    text = repr(value)
    return shorten(text)


def _data_path(location: Iterable[str | int], data: Any) -> tuple[Path, Any]:
    """Return (path, value) of the part of pydantic's location that exists in the data.

    Pydantic adds the names of union branches to its locations.
    """
    path: list[str | int] = []
    for part in location:
        in_mapping = isinstance(data, dict) and part in data
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if not (in_mapping or in_list):
            continue
        data = data[part]
        path.append(part)
    return tuple(path), data


def _section_models(annotation: object) -> list[type[BaseModel]]:
    """Return the recipe sections in a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for part in typing.get_args(annotation) for model in _section_models(part)]
    return []


def _section_model(path: Path, data: Any) -> type[BaseModel] | None:
    """Return the model that validates the mapping at `path`; None if it is unknown."""
    model: type[BaseModel] = Recipe
    for part in path:
        data = data[part]
        if isinstance(part, int):
            continue
        if model is Recipe and part == "method":
            name = data.get("name") if isinstance(data, dict) else None
            if name not in METHODS:
                return None
            model = METHODS[name].options
            continue
        field = model.model_fields.get(str(part))
        inner = _section_models(field.annotation) if field else []
        if not inner:
            return None
        model = inner[0]
    return model


def homes_of_key(key: str) -> list[str]:
    """Return where in a recipe a key of this name belongs, such as train.learning_rate."""
    homes = []
    for section, info in Recipe.model_fields.items():
        models = [m.options for m in METHODS.values()] if section == "method" else _section_models(info.annotation)
        if any(key in model.model_fields for model in models):
            homes.append(f"{section}.{key}")
    return homes


def _suggest(path: Path, data: object) -> str:
    """Suggest the default value of a field; empty if it has none that fits a line."""
    section = _section_model(path[:-1], data)
    field = section.model_fields.get(str(path[-1])) if section and path else None
    default = None if field is None or field.is_required() else field.default
    if default is None or isinstance(default, BaseModel | list | dict):
        return ""
    return f"try {path[-1]}: {str(default).lower() if isinstance(default, bool) else default}"


def _refused_value(translation: str) -> str:
    """Return what a key takes where the value of "key: value" is not that; empty for a value that it takes."""
    key, _, text = translation.partition(": ")
    *sections, last = key.split(".")
    method = {"virtual_tokens": "prefix", "double_quant": "qlora"}.get(last, "lora")
    recipe: dict[str, Any] = {"base": {"id": "x"}, "method": {"name": method}, "data": {"train": "x"}}
    section = recipe
    for part in sections:
        section = section.setdefault(part, {})
    section[last] = parse_value(text)
    try:
        Recipe.model_validate(recipe)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        if item["type"] == "union_tag_invalid":
            return f"one of {', '.join(sorted(METHODS))}"
        return str(_EXPECTED.get(item["type"], lambda _: "another value")(item.get("ctx", {})))
    return ""


def validation_problems(error: ValidationError, data: object, where: Callable[[Path], str]) -> list[Problem]:
    """Return all problems of a validation, one per key. `where` gives file, line and key of a path."""
    problems: dict[Path, Problem] = {}
    expected: dict[Path, list[str]] = {}
    translated: set[str] = set()  # keys that those of other tools stand for
    for item in error.errors(include_url=False):
        path, value = _data_path(item["loc"], data)
        kind, context = item["type"], item.get("ctx", {})
        if kind in {"union_tag_invalid", "union_tag_not_found"}:
            place = where(path)
            section = data.get("method") if isinstance(data, dict) else None
            names = sorted(METHODS)
            if not isinstance(section, dict) or "name" not in section:
                problems[path] = Problem(place, "no method.name", f"one of {', '.join(names)}", "try name: lora")
            else:
                problems[path] = Problem(
                    f"{place}.name",
                    show_value(section["name"]),
                    f"one of {', '.join(names)}",
                    did_you_mean(str(section["name"]), names),
                )
        elif kind == "missing":
            missing_path = (*path, item["loc"][-1])
            problems[missing_path] = Problem(
                where(missing_path), "nothing", "a value: it is required", f"add {item['loc'][-1]}: ..."
            )
        elif kind == "extra_forbidden":
            key = str(path[-1])
            model = _section_model(path[:-1], data)
            known_keys = list(model.model_fields) if model else []
            if len(path) == 1:
                known_keys.append("extends")
            homes = [home for home in homes_of_key(key) if home != ".".join(map(str, path))]
            section, siblings = ".".join(map(str, path[:-1])), cast(Any, data)
            for part in path[:-1]:
                siblings = siblings[part]
            translation, instead = translate_key(key, value, siblings)
            if homes:
                fix = f"{key} belongs elsewhere: {' or '.join(homes)}"
            elif translation and (takes := _refused_value(translation)):
                fix = f"its key here is {translation.partition(':')[0]}, which takes {takes}"
            elif translation:
                home = translation.partition(":")[0].rpartition(".")[0]
                fix = f"write {translation.removeprefix(f'{home}.')}{f' under {home}' if home != section else ''}"
                translated.add(translation.partition(":")[0])
            else:
                fix = instead or did_you_mean(key, known_keys)
            problems[path] = Problem(where(path), f"the key {shorten(key)}", f"a key of {section or 'a recipe'}", fix)
        else:
            expectation = _EXPECTED.get(kind, lambda c, m=item["msg"]: m)(context)
            expected.setdefault(path, [])
            if expectation not in expected[path]:
                expected[path].append(expectation)
            expected_text = " or ".join(expected[path])
            fix = (
                did_you_mean(value, expected_text.replace(" or ", ", ").split(", "))
                if kind == "literal_error" and isinstance(value, str) and len(expected[path]) == 1
                else _suggest(path, data)
            )
            problems[path] = Problem(where(path), show_value(value), expected_text, fix if "known:" not in fix else "")
    for section, key in (("base", "base"), ("method", "method.name"), ("data", "data.train")):
        # what another tool's key says is not missing as well
        if key in translated and (problem := problems.get((section,))) and problem.got == "nothing":
            del problems[(section,)]
    return list(problems.values())
