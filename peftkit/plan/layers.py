"""Where in the depth of a model the trained parameters stand: counts by ranges of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftkit.archs import ModelShape, Module, Tensor
from peftkit.methods import Method, Selection

Layer = tuple[str, int]  # ("model.layers", 3)
OUTSIDE, SHARED = "outside the layers", "shared by the layers"


def layer_of(name: str) -> Layer | None:
    """The stack and number of the layer that a module's path stands in: its first number."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


def by_layers(method: Method, options: Any, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Trained parameters by range of alike layers, for example {"model.layers 0-31": 41943040}.

    What stands in no layer, and what all layers share, is named so. The sum is what `method.count` gives.
    """
    whole = sum(method.count(options, shape, selection).values())
    if method.virtual_tokens:  # counted from the model's sizes, not from its modules
        return {SHARED: whole} if whole else {}
    modules_in: dict[Layer | None, list[Module]] = {}
    tensors_in: dict[Layer | None, list[Tensor]] = {}
    for module in shape.modules:
        modules_in.setdefault(layer_of(module.name), []).append(module)
    for tensor in shape.tensors:
        tensors_in.setdefault(layer_of(tensor.name), []).append(tensor)
    adapted = {module.name for module in selection.modules}
    counts: dict[Layer | None, int] = {}
    for layer in {**modules_in, **tensors_in}:
        modules = modules_in.get(layer, [])
        here = replace(shape, modules=tuple(modules), tensors=tuple(tensors_in.get(layer, ())))
        chosen = replace(selection, modules=tuple(m for m in modules if m.name in adapted))
        counts[layer] = sum(method.count(options, here, chosen).values())
    nothing = replace(shape, modules=(), tensors=())
    constant = sum(method.count(options, nothing, Selection()).values())  # single token rows
    found = _ranges({layer: num - constant for layer, num in counts.items() if layer is not None})
    rest = {OUTSIDE: counts.get(None, constant)}
    rest[SHARED] = whole - sum(found.values()) - rest[OUTSIDE]
    return {**found, **{name: num for name, num in rest.items() if num}}


def _ranges(counts: Mapping[Layer, int]) -> dict[str, int]:
    """Neighbours with the same count together."""
    ranges: list[tuple[str, int, int, int]] = []  # stack, first, last, count of each
    for (stack, number), num in sorted(counts.items()):
        if not num:
            continue
        if ranges and ranges[-1][0] == stack and ranges[-1][2] == number - 1 and ranges[-1][3] == num:
            ranges[-1] = (stack, ranges[-1][1], number, num)
        else:
            ranges.append((stack, number, number, num))
    return {
        f"{stack} {first}-{last}" if last > first else f"{stack} {first}": num * (last - first + 1)
        for stack, first, last, num in ranges
    }
