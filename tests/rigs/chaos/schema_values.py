"""Values that the recipe's schema takes, and recipes of them."""

from __future__ import annotations

import math
import random
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peftkit.methods import METHODS
from peftkit.recipe.schema import Recipe

TINY = Path(__file__).parents[2] / "assets" / "tiny-llama"
_LETTERS = "abz AZ09-_./:#&*!|>'\"%@`{}[],?~é漢\U0001f600\n\t\x7f\u2028"


@dataclass(frozen=True)
class Slot:
    """One key of the recipe: its path, annotation and bounds."""

    path: tuple[str, ...]
    annotation: Any
    bounds: tuple[Any, ...]

    @property
    def kinds(self) -> set[Any]:
        """The plain types that it takes, with "choice" for words."""
        return set(_kinds(self.annotation))


def _kinds(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _kinds(typing.get_args(annotation)[0])
    elif origin is typing.Literal:
        for value in typing.get_args(annotation):
            yield "choice" if isinstance(value, str) else type(value)
    elif origin in {typing.Union, types.UnionType}:
        for part in typing.get_args(annotation):
            yield from _kinds(part)
    elif origin is not None:
        yield origin
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield BaseModel
    else:
        yield annotation


def _bounds(annotation: Any) -> Iterator[Any]:
    """Ge, Gt, Lt, MinLen inside an annotation."""
    for part in typing.get_args(annotation):
        yield from getattr(part, "metadata", ()) if not isinstance(part, type) else ()
        yield from _bounds(part)


def slots(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Slot]:
    """All keys of a section, and of those inside it."""
    for name, info in model.model_fields.items():
        if path == () and name == "method":
            continue
        bounds = (*info.metadata, *_bounds(info.annotation))
        yield Slot((*path, name), info.annotation, bounds)
        for inner in _sections(info.annotation):
            if name not in {"train", "eval"} or path != ("data",):  # sources are written as text here
                yield from slots(inner, (*path, name))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is list:  # its sections have no path of their own
        return []
    return [model for part in typing.get_args(annotation) for model in _sections(part)]


def slots_of(method: str) -> list[Slot]:
    """All keys of a recipe with this method."""
    return [*slots(Recipe), *slots(METHODS[method].options, ("method",))]


def bounds_of(bounds: tuple[Any, ...]) -> tuple[float, float, bool, bool]:
    """(low, high, low itself taken, high itself taken)."""
    low, high, at_low, at_high = -math.inf, math.inf, True, True
    for bound in bounds:
        if (value := getattr(bound, "ge", None)) is not None:
            low, at_low = value, True
        if (value := getattr(bound, "gt", None)) is not None:
            low, at_low = value, False
        if (value := getattr(bound, "lt", None)) is not None:
            high, at_high = value, False
    return low, high, at_low, at_high


def _number(rng: random.Random, kind: type, bounds: tuple[Any, ...]) -> Any:
    low, high, at_low, _ = bounds_of(bounds)
    start = 0.0 if low == -math.inf else low
    if kind is int:
        least = int(start) + (0 if at_low else 1)
        most = min(high - 1, 10 ** rng.choice([1, 2, 4, 9]))
        return rng.randint(least, max(least, int(most)))
    end = high if high < math.inf else start + 10.0 ** rng.randint(-6, 4)
    value = start + (end - start) * rng.uniform(1e-6, 0.999999)
    return rng.choice([value, float(f"{value:.2g}")]) if start < float(f"{value:.2g}") < end else value


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 12)))


_FIXED: dict[tuple[str, ...], Callable[[random.Random], Any]] = {
    ("base", "id"): lambda rng: str(TINY),
    ("start_from",): lambda rng: None,
    ("data", "train"): lambda rng: rng.choice(["rows.jsonl", ["rows.jsonl"], {"path": "rows.jsonl"}]),
    ("data", "eval"): lambda rng: rng.choice(["5%", "33.3%", 0.25, 0, None, "held.jsonl", {"path": "held.jsonl"}]),
    ("data", "columns"): lambda rng: {_word(rng): _word(rng) for _ in range(rng.randint(0, 3))},
    ("train", "schedule", "warmup"): lambda rng: rng.choice(["0%", "12.5 %", 0.1, 0]),
}


_MADE: dict[Any, Callable[[random.Random], Any]] = {
    bool: lambda rng: rng.random() < 0.5,
    str: _word,
    type(None): lambda rng: None,
}


def fill(rng: random.Random, slot: Slot) -> Any:
    """A value that the schema takes."""
    if slot.path in _FIXED:
        return _FIXED[slot.path](rng)
    return _fill(rng, slot.annotation, slot.bounds, slot.path)


def _fill(rng: random.Random, annotation: Any, bounds: tuple[Any, ...], path: tuple[str, ...]) -> Any:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [b for part in parts[1:] for b in getattr(part, "metadata", ())]
        return _fill(rng, parts[0], (*bounds, *inner), path)
    if origin is typing.Literal:
        return rng.choice(parts)
    if origin in {typing.Union, types.UnionType}:
        return _fill(rng, rng.choice(parts), bounds, path)
    if origin is list:
        least = 1 if any(getattr(b, "min_length", 0) for b in bounds) else 0
        return [_fill(rng, parts[0], (), path) for _ in range(rng.randint(least, 3))]
    if origin is dict:
        return {_word(rng): _fill(rng, parts[1], (), path) for _ in range(rng.randint(0, 3))}
    if annotation in {int, float}:
        return _number(rng, annotation, bounds)
    if annotation in _MADE:
        return _MADE[annotation](rng)
    found = {}
    for name, info in annotation.model_fields.items():
        if info.is_required() or rng.random() < 0.5:
            found[name] = fill(rng, Slot((*path, name), info.annotation, (*info.metadata, *_bounds(info.annotation))))
    return found


_NEEDED = {"rope_scaling": {"factor": 2.0}, "target": {"value": 1.0}}  # what a section cannot be without


def put(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a value, with the sections above it."""
    for part in path[:-1]:
        if not isinstance(data.get(part), dict):
            data[part] = dict(_NEEDED.get(part, {}))
        data = data[part]
    data[path[-1]] = value


def valid(rng: random.Random) -> dict[str, Any]:
    """A recipe that loads, with any of the keys there are. Not every one of them can be planned."""
    method = rng.choice(sorted(METHODS))
    data: dict[str, Any] = {"base": {"id": str(TINY)}, "method": {"name": method}, "data": {}}
    everything = [s for s in slots_of(method) if BaseModel not in s.kinds or s.path in _FIXED]
    for slot in rng.sample(everything, rng.randint(0, min(12, len(everything)))):
        put(data, slot.path, fill(rng, slot))
    data["method"]["name"] = method
    data["base"]["id"] = str(TINY)
    data["data"].setdefault("train", "rows.jsonl")
    if isinstance(data["data"].get("eval"), dict) and rng.random() < 0.5:
        data["data"]["eval"]["rows"] = 2
    data = {key: data[key] for key in rng.sample(sorted(data), len(data))}
    if rng.random() < 0.3 and set(data["base"]) == {"id"}:
        data["base"] = data["base"]["id"]
    if rng.random() < 0.3 and set(data["method"]) == {"name"}:
        data["method"] = method
    return data


def plain(rng: random.Random) -> dict[str, Any]:
    """A recipe that can be planned: nothing in it contradicts the base or the data."""
    method: dict[str, Any] = {"name": rng.choice(["lora", "lora", "lora", "prefix", "ia3", "full", "vera", "ln"])}
    if method["name"] == "lora":
        method |= {"rank": rng.randint(1, 32), "dropout": round(rng.uniform(0, 0.9), 3)}
        method |= rng.choice([{}, {"alpha": rng.uniform(0.1, 64)}, {"rslora": True}, {"targets": ["q", "v"]}])
    micro = rng.choice([1, 2, 4])
    train = {
        "learning_rate": 10 ** rng.uniform(-6, -2),
        "batch_size": micro * rng.randint(1, 4),
        "micro_batch": micro,
        "max_length": rng.randint(16, 128),
        "weight_decay": rng.choice([0, 0.01]),
        "max_grad_norm": rng.uniform(0.1, 2),
        "schedule": {"kind": rng.choice(["cosine", "linear", "constant"]), "warmup": rng.choice(["5%", 0.1])},
        rng.choice(["epochs", "max_steps"]): rng.randint(1, 20),
    }
    kept = {key: train[key] for key in rng.sample(sorted(train), rng.randint(0, len(train)))}
    if ("batch_size" in kept) != ("micro_batch" in kept):
        kept.pop("batch_size", None)
        kept.pop("micro_batch", None)
    data: dict[str, Any] = {"train": "rows.jsonl", "eval": rng.choice(["25%", 0.25, None, "held.jsonl"])}
    return {"base": str(TINY), "method": method, "data": data, "train": kept, "seed": rng.randrange(2**32)}
