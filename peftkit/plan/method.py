"""The method's part of a plan: what is adapted, how PEFT is told, how many parameters that trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftkit.archs import ModelShape, Module, Tensor, place_of
from peftkit.methods import METHODS, Method, PeftSpec, Selection, TokenRows
from peftkit.methods.lora import LoraOptions
from peftkit.plan.decisions import Decisions
from peftkit.plan.plan import MethodPlan
from peftkit.plan.targets import resolve_parameters, resolve_targets, select

LOW_COVERAGE = 0.5  # below this share in 4-bit, QLoRA saves little


def _spec(
    method: Method, options: Any, shape: ModelShape, selection: Selection, num_steps: int | None
) -> PeftSpec | None:
    """PEFT's class and arguments, with those that follow from the number of steps where it is known."""
    spec = method.peft(options, shape, selection)
    if spec is None or method.schedule is None or num_steps is None:
        return spec
    return PeftSpec(spec.class_name, {**spec.arguments, **method.schedule(num_steps)})


def default_selection(method: Method, shape: ModelShape) -> Selection:
    """What a method adapts where the recipe does not say."""
    if method.default_roles is None:
        return Selection()
    roles, _ = method.default_roles(shape)
    modules, _ = resolve_targets(roles, shape, method, "method.targets")
    return select(modules, shape, as_parameters=method.reaches_parameters)


def _selection(d: Decisions, shape: ModelShape, method: Method) -> Selection:
    wanted = getattr(d.loaded.recipe.method, "targets", None)
    if wanted is None or method.default_roles is None:
        return Selection()
    roles, reason = method.default_roles(shape)
    if wanted == "auto" and not roles:
        return Selection()
    asked = roles if wanted == "auto" else wanted
    modules, problems = resolve_targets(asked, shape, method, d.where("method.targets"))
    d.problems.extend(problems)
    extra = getattr(d.loaded.recipe.method, "target_parameters", ())
    named, problems = resolve_parameters(extra, shape, d.where("method.target_parameters"))
    d.problems.extend(problems)
    wanted_names = {module.name for module in (*modules, *named)}
    modules = [module for module in shape.modules if module.name in wanted_names]
    chosen = select(modules, shape, as_parameters=method.reaches_parameters, named=named)
    shown = [*chosen.names, *chosen.parameters]
    if wanted == "auto":
        d.keep("method.targets", wanted, shown, reason)
    else:
        d.keep("method.targets", shown)
    _tell_left_out(d, shape, asked)
    return chosen


def _tell_left_out(d: Decisions, shape: ModelShape, asked: Any) -> None:
    """Layers that a group would mean, left out for a reason of the family: each reason once."""
    if "all-linear" not in ([asked] if isinstance(asked, str) else asked):
        return
    reasons: dict[str, list[str]] = {}
    for module in shape.modules:
        if module.blocked:
            last = module.name.rsplit(".", 1)[-1]
            reasons.setdefault(module.blocked, [])
            if last not in reasons[module.blocked]:
                reasons[module.blocked].append(last)
    if reasons:
        names = [name for listed in reasons.values() for name in listed]
        why = "; ".join(f"{', '.join(listed)}: {reason}" for reason, listed in reasons.items())
        d.decide("method.left_out", names, why)


def coverage(shape: ModelShape) -> float:
    """The share of parameters that 4-bit stores: matrices of linear layers and of fused experts."""
    held = sum(max(1, m.num) * m.d_in * m.d_out for m in shape.modules if _in_4bit(m, shape))
    held += sum(t.num_parameters for t in shape.tensors if t.role == "shared adapters")  # linear too
    return held / shape.num_parameters


def _in_4bit(module: Module, shape: ModelShape) -> bool:
    return module.name.rsplit(".", 1)[-1] not in shape.family.skip_4bit


def largest_rest(shape: ModelShape) -> str:
    """The role that holds most of what 4-bit leaves out."""
    rest: dict[str, int] = {}
    for module in shape.modules:
        if not _in_4bit(module, shape):
            rest[module.role] = rest.get(module.role, 0) + module.num_parameters
    for tensor in shape.tensors:
        rest[tensor.role] = rest.get(tensor.role, 0) + tensor.num_parameters
    return max(rest, key=lambda role: rest[role])


def _refuse_where_impossible(d: Decisions, shape: ModelShape, method: Method) -> bool:
    reason = refusal(method, shape)
    if not reason:
        return False
    instead = nearest_method(method, shape)
    d.refuse(
        "method.name",
        f"{method.name} on {shape.family.name}",
        f"a method that works on {shape.family.name}",
        f"{reason}; the nearest that works: {instead}",
    )
    return True


def method_plan(d: Decisions, shape: ModelShape, num_steps: int | None) -> MethodPlan:
    """Resolve targets, check every option against the model, count."""
    options = d.loaded.recipe.method
    method = METHODS[options.name]
    impossible = _refuse_where_impossible(d, shape, method)
    selection = Selection() if impossible else _selection(d, shape, method)
    d.keep("method.name", method.name)
    shown = {"name", "targets", "alpha"} if isinstance(options, LoraOptions) else {"name", "targets"}
    for name, value in options.model_dump(mode="json").items():
        if name not in shown:
            d.keep(f"method.{name}", value)
    rows: tuple[str, ...] = ()
    if isinstance(options, LoraOptions):
        d.keep("method.alpha", options.alpha, options.scale_alpha, "2 x rank")
        tokens = [t for item in options.also_train if isinstance(item, TokenRows) for t in item.tokens]
        rows = tuple(dict.fromkeys(tokens))
    if not impossible:
        for conflict in method.conflicts(options, shape, selection):
            d.refuse(f"method.{conflict.key}", conflict.got, conflict.expected, conflict.fix)
    if method.adds_penalty and (shape.task != "causal-lm" or shape.family.inferred):
        why = "the loss is worked out from the logits here, and PEFT adds its penalty to the model's own"
        d.decide("method.penalty", 0, why)
    if num_steps is not None and num_steps < method.min_steps:
        got, fix = f"{num_steps} with {method.name}", "train longer, or use method lora"
        d.refuse("train.max_steps", got, f"at least {method.min_steps} steps", fix)
    if shape.family.inferred:
        d.decide("base.family", shape.family.name, shape.family.mind[0])
    counted = None if d.problems else {k: v for k, v in method.count(options, shape, selection).items() if v}
    return MethodPlan(
        name=method.name,
        peft=None if d.problems else _spec(method, options, shape, selection, num_steps),
        target_modules=selection.names,
        target_parameters=selection.parameters,
        token_rows=rows,
        lr_ratio=getattr(options, "lr_ratio", None),
        trainable_by_role=counted,
        trainable_by_layers={} if d.problems else by_layers(method, options, shape, selection),
        num_parameters=shape.num_parameters,
        roles={place_of(module.name): module.role for module in shape.modules},
    )


def refusal(method: Method, shape: ModelShape) -> str:
    """Why a method cannot work on a model; empty where it can."""
    known = shape.family.refuses.get(method.name) or method.refuses(shape)
    if known:
        return known
    if method.default_roles is not None and not method.default_roles(shape)[0]:
        return f"none of its layers plays a role that {method.name} adapts"
    return ""


def nearest_method(method: Method, shape: ModelShape) -> str:
    """The method to use instead of one that is refused."""
    seen = {method.name}
    name = method.nearest
    while refusal(METHODS[name], shape) and name not in seen:
        seen.add(name)
        name = METHODS[name].nearest
    return name


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
