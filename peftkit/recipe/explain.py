"""Validation errors as problems a person can mend: file, line, key, got, expected, nearest key."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from peftkit.errors import Problem, did_you_mean
from peftkit.methods import METHODS
from peftkit.recipe.schema import Recipe
from peftkit.units import clipped

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


def show(value: Any) -> str:
    """A value as an error shows it: text in quotes, everything short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, int) and abs(value) >= 10**60:
        return f"a number of about {value.bit_length() * 0.30103:,.0f} digits"
    text = repr(value)
    return clipped(text)


def _resolve(loc: Iterable[str | int], data: Any) -> tuple[Path, Any]:
    """The part of pydantic's location that exists in the data (it adds names of union branches)."""
    path: list[str | int] = []
    for part in loc:
        in_mapping = isinstance(data, dict) and part in data
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if not (in_mapping or in_list):
            continue
        data = data[part]
        path.append(part)
    return tuple(path), data


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The recipe sections inside a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for part in typing.get_args(annotation) for model in _models(part)]
    return []


def _section(path: Path, data: Any) -> type[BaseModel] | None:
    """The model that validates the mapping at `path`."""
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
        found = model.model_fields.get(str(part))
        inner = _models(found.annotation) if found else []
        if not inner:
            return None
        model = inner[0]
    return model


def _homes(key: str) -> list[str]:
    """Where in a recipe a key of this name belongs."""
    homes = []
    for section, info in Recipe.model_fields.items():
        models = [m.options for m in METHODS.values()] if section == "method" else _models(info.annotation)
        if any(key in model.model_fields for model in models):
            homes.append(f"{section}.{key}")
    return homes


def _unknown_key(path: Path, data: Any) -> tuple[str, str]:
    key = str(path[-1])
    section = _section(path[:-1], data)
    known = list(section.model_fields) if section else []
    if len(path) == 1:
        known.append("extends")
    homes = [home for home in _homes(key) if home != ".".join(map(str, path))]
    if homes:
        return "a key of this section", f"{key} belongs elsewhere: {' or '.join(homes)}"
    return "a known key", did_you_mean(key, known)


def _method_tag(path: Path, data: Any, where: str) -> Problem:
    section = data.get("method") if isinstance(data, dict) else None
    names = sorted(METHODS)
    if not isinstance(section, dict) or "name" not in section:
        return Problem(where, "no method.name", f"one of {', '.join(names)}", "try name: lora")
    return Problem(
        f"{where}.name",
        show(section["name"]),
        f"one of {', '.join(names)}",
        did_you_mean(str(section["name"]), names),
    )


def _suggest(path: Path, data: Any, expected: str) -> str:
    """A value that would be accepted: the default, where there is one."""
    section = _section(path[:-1], data)
    field = section.model_fields.get(str(path[-1])) if section and path else None
    default = None if field is None or field.is_required() else field.default
    if default is None or isinstance(default, BaseModel | list | dict):
        return ""
    return f"try {path[-1]}: {str(default).lower() if isinstance(default, bool) else default}"


def explain(error: ValidationError, data: Any, where: Callable[[Path], str]) -> list[Problem]:
    """All problems of a validation, one per key. `where` gives file, line and key of a path."""
    problems: dict[Path, Problem] = {}
    expected: dict[Path, list[str]] = {}
    for item in error.errors(include_url=False):
        path, value = _resolve(item["loc"], data)
        kind, context = item["type"], item.get("ctx", {})
        if kind in {"union_tag_invalid", "union_tag_not_found"}:
            problems[path] = _method_tag(path, data, where(path))
        elif kind == "missing":
            full = (*path, item["loc"][-1])
            problems[full] = Problem(
                where(full), "nothing", "a value: it is required", f"add {item['loc'][-1]}: ..."
            )
        elif kind == "extra_forbidden":
            wanted, fix = _unknown_key(path, data)
            problems[path] = Problem(where(path), "an unknown key", wanted, fix)
        else:
            text = _EXPECTED.get(kind, lambda c, m=item["msg"]: m)(context)
            expected.setdefault(path, [])
            if text not in expected[path]:
                expected[path].append(text)
            wanted = " or ".join(expected[path])
            fix = (
                did_you_mean(value, wanted.replace(" or ", ", ").split(", "))
                if kind == "literal_error" and isinstance(value, str) and len(expected[path]) == 1
                else _suggest(path, data, wanted)
            )
            problems[path] = Problem(where(path), show(value), wanted, fix if "known:" not in fix else "")
    return list(problems.values())
