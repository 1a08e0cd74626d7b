"""Resolution of what a method names in a model: roles, groups, names and layers, each proven to match something."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from peftkit.archs import ATTENTION_ROLES, EXPERT_ROLES, ModelShape, Module, Tensor, shortest_names
from peftkit.archs.family import ROLES_NOT_BY_DEFAULT, SHARED_WEIGHT
from peftkit.errors import Problem, nearest
from peftkit.methods import Method, Selection
from peftkit.methods.base import MATCH, WHOLE_PARTS

LayerPosition = tuple[str, int]  # ("model.layers", 3)
Value = TypeVar("Value")


def layer_position(name: str) -> LayerPosition | None:
    """Return (stack, number) of the layer that a module's path lies in: its first number; None outside."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


def matches_target(module_name: str, target: str) -> bool:
    """Apply PEFT's rule for a list of targets: the whole name, or an ending at a dot."""
    return module_name == target or module_name.endswith(f".{target}")


def unmatched_targets(
    names: Sequence[str], targets: Sequence[str], where: str, *, what: str = "module"
) -> list[Problem]:
    """Return a problem for each target that matches none of the `names`."""
    endings = sorted(
        {".".join(name.split(".")[-depth:]) for name in names for depth in (1, 2) if not name.split(".")[-1].isdigit()}
    )
    problems = []
    for target in targets:
        if not any(matches_target(name, target) for name in names):
            suggestions = nearest(target, endings, count=3) or [e for e in endings if "." not in e][:8]
            problems.append(
                Problem(
                    where,
                    f"{target!r}, which matches no {what}",
                    f"a {what} of the model",
                    f"nearest: {', '.join(suggestions)}",
                )
            )
    return problems


def _parameter_name(module: Module) -> str:
    """Return the name of the parameter behind a module that PEFT reaches as a parameter."""
    return module.name if module.in_experts else f"{module.name}.weight"


def make_selection(
    modules: Sequence[Module], shape: ModelShape, *, as_parameters: bool, by_parameter: Sequence[Module] = ()
) -> Selection:
    """Build the selection by which PEFT reaches these modules.

    `as_parameters`: take weights, as PEFT's LoRA renames fused experts. `by_parameter` are modules that the
    recipe wants reached by their parameters.
    """
    by_weight = [m for m in modules if m.in_experts or m in by_parameter or (as_parameters and m.by_parameter)]
    by_name = [m for m in modules if m not in by_weight]
    tensor_names = [tensor.name for tensor in shape.tensors]
    all_names = [module.name for module in shape.modules] + tensor_names
    weights = [_parameter_name(module) for module in shape.modules]
    return Selection(
        tuple(modules),
        shortest_names([m.name for m in by_name], all_names),
        shortest_names([_parameter_name(m) for m in by_weight], weights),
    )


def resolve_parameters(names: Sequence[str], shape: ModelShape, where: str) -> tuple[list[Module], list[Problem]]:
    """Return the modules behind parameters that the recipe names, and problems with the names."""
    weights = {_parameter_name(module): module for module in shape.modules}
    modules = [m for weight, m in weights.items() if any(matches_target(weight, name) for name in names)]
    return modules, unmatched_targets(list(weights), names, where, what="parameter")


def _unknown_item(item: str, shape: ModelShape, where: str) -> Problem:
    roles = ", ".join(dict.fromkeys(m.role for m in shape.modules if not m.blocked_reason))
    names = [module.name for module in shape.modules]
    if not item.startswith(MATCH):
        [problem] = unmatched_targets(names, [item], where)
        fix = f"roles of {shape.family.name}: {roles}; {problem.fix}"
        return Problem(where, problem.got, "a role or module of the model", fix)
    pattern = item.removeprefix(MATCH)
    if any(re.search(pattern, name) for name in names):
        fix = f"it must match the whole name: match:.*{pattern}.*"
    else:
        fix = f"a name of this model: {names[0]}" if names else ""
    return Problem(where, f"{item!r}, which matches no module", "a regular expression of whole names", fix)


def _modules_named(item: str, shape: ModelShape, where: str) -> tuple[list[Module], list[Problem]]:
    """Return the modules that one item names, and problems with it.

    An item is a group, a role, a module's name or its end, or match: and a regular expression of whole names.
    """
    adaptable = [m for m in shape.modules if not m.blocked_reason]
    if item == "all-linear":
        modules = [m for m in adaptable if m.role not in ROLES_NOT_BY_DEFAULT]
    elif item == "attention":
        modules = [m for m in adaptable if m.role in ATTENTION_ROLES or m.role.startswith("ssm_in")]
    elif item == "experts":
        modules = [m for m in adaptable if m.role in EXPERT_ROLES]
    elif item.startswith(MATCH):
        try:
            pattern = re.compile(item.removeprefix(MATCH))
        except re.error as error:
            return [], [Problem(where, f"{item!r}: {error}", "a regular expression")]
        modules = [m for m in shape.modules if pattern.fullmatch(m.name)]
    else:
        by_role = [m for m in shape.modules if m.role == item]
        modules = by_role or [m for m in shape.modules if matches_target(m.name, item)]
    table = {shape.family.embeddings: "embeddings", shape.family.head: "head"}.get(item)
    if not modules and table is not None:
        fix = f"also_train: [{table}] trains it whole" + (
            "; {tokens: [...]} trains single rows and keeps the tie" if shape.tied_embeddings else ""
        )
        return [], [Problem(where, f"{item!r}, the model's {table}", "a layer inside the blocks", fix)]
    return modules, [] if modules else [_unknown_item(item, shape, where)]


def resolve_items(
    items: Mapping[str, Value], modules: Sequence[Module], shape: ModelShape, where: str
) -> tuple[dict[str, Value], list[Problem]]:
    """Return the value of each of the `modules` that an item names, by name; of several items the last counts.

    An item that names none of the `modules` is a problem.
    """
    values: dict[str, Value] = {}
    problems: list[Problem] = []
    among = {module.name for module in modules}
    for item, value in items.items():
        named, item_problems = _modules_named(item, shape, where)
        found = [module.name for module in named if module.name in among]
        if not item_problems and not found:
            roles = ", ".join(dict.fromkeys(module.role for module in modules))
            item_problems = [
                Problem(where, f"{item!r}, which is not adapted", "one of the targets", f"these are {roles}")
            ]
        problems += item_problems
        values |= dict.fromkeys(found, value)
    return values, problems


def resolve_whole(items: Sequence[str], shape: ModelShape, where: str) -> tuple[list[Module | Tensor], list[Problem]]:
    """Return the layers and other parts that the recipe wants trained themselves, and problems with their names."""
    parts: dict[str, Module | Tensor] = {}
    problems: list[Problem] = []
    for item in items:
        tensors = [t for t in shape.tensors if matches_target(t.name, item) and t.role not in {"embeddings", "head"}]
        modules: list[Module] = []
        if not tensors:
            modules, item_problems = _modules_named(item, shape, where)
            alike = nearest(item, WHOLE_PARTS)
            problems += [replace(p, fix=f"did you mean {alike[0]}?") if alike else p for p in item_problems]
        blocked = [module for module in modules if module.in_experts or module.blocked_reason == SHARED_WEIGHT]
        if blocked:
            got = f"{item!r}: {blocked[0].name} is no layer of its own"
            problems.append(Problem(where, got, "layers that PEFT can copy", "leave it out"))
        parts |= {tensor.name: tensor for tensor in tensors} | {module.name: module for module in modules}
    return list(parts.values()), problems


def resolve_layers(layers: object, names: Iterable[str], where: str) -> tuple[set[LayerPosition], list[Problem]]:
    """Return the positions of layers in each stack of a model with these names, and problems with the request.

    `layers` is a number, "first N", "last N", "FIRST-LAST", or a list of these.
    """
    stacks: dict[str, set[int]] = {}
    for stack, number in filter(None, map(layer_position, names)):
        stacks.setdefault(stack, set()).add(number)
    items = layers if isinstance(layers, list) else str(layers).split(",")
    chosen: set[LayerPosition] = set()
    problems: list[Problem] = []
    for item in (str(item).strip() for item in items):
        match = re.fullmatch(r"(first|last) +(\d+)|(\d+)(?: *- *(\d+))?", item)
        found: set[LayerPosition] = set()
        is_whole = False  # in one stack at least: an encoder may have more layers than its decoder
        end, count, low, high = match.groups() if match else (None, "0", None, None)
        for stack, numbers in stacks.items():
            ordered = sorted(numbers)
            if low is None:
                num = min(int(count), len(ordered))
                picked = ordered[:num] if end == "first" else ordered[len(ordered) - num :]
                is_whole |= 0 < int(count) <= len(ordered)
            else:
                first, last = int(low), int(high or low)
                picked = [number for number in ordered if first <= number <= last]
                is_whole |= first in picked and last in picked
            found |= {(stack, number) for number in picked}
        if not is_whole:
            has = ", ".join(f"{stack} {min(numbers)}-{max(numbers)}" for stack, numbers in stacks.items())
            expected = "last 8, first 8, 0-15, a number, or a list of these"
            problems.append(Problem(where, f"{item!r}", expected, f"the model has {has or 'no numbered layers'}"))
        chosen |= found
    return chosen, problems


def resolve_targets(
    targets: str | Sequence[str],
    shape: ModelShape,
    method: Method,
    where: str,
    *,
    layers: set[LayerPosition] | None = None,
    exclude: Container[str] = (),
) -> tuple[list[Module], list[Problem]]:
    """Return the modules that the recipe asks for, in model order, and problems with the request.

    Without those outside of the `layers`, and those whose names are to `exclude`.
    """
    module_names: set[str] = set()
    problems: list[Problem] = []
    for item in [targets] if isinstance(targets, str) else targets:
        named, item_problems = _modules_named(item, shape, where)
        problems += item_problems
        in_layers = [module for module in named if layers is None or layer_position(module.name) in layers]
        if named and not in_layers:
            problems.append(Problem(where, f"{item!r} outside of method.layers", "modules in these layers"))
        modules = [module for module in in_layers if module.name not in exclude]
        blocked_modules = [m for m in modules if m.blocked_reason]
        if blocked_modules:
            fix = "leave it out; the default targets are those that work"
            problems.append(
                Problem(where, f"{item!r}: {blocked_modules[0].blocked_reason}", "modules that can be adapted", fix)
            )
        fused_experts = [m for m in modules if m.in_experts]
        if fused_experts and not method.reaches_parameters:
            problems.append(
                Problem(
                    where,
                    f"{item!r} with {method.name}",
                    "layers of their own",
                    f"{fused_experts[0].role} is a fused parameter, which only LoRA reaches: use method lora",
                )
            )
        module_names |= {m.name for m in modules}
    return [m for m in shape.modules if m.name in module_names], problems
