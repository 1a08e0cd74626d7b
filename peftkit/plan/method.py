"""The method section of a plan: targets, PEFT's arguments, trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peftkit.archs import ModelShape, Module, Tensor, wildcard_name
from peftkit.methods import METHODS, Method, PeftSpec, Selection, TokenRows
from peftkit.methods.base import WHOLE_PARTS, TargetOptions
from peftkit.methods.lora import LoraOptions, new_tokens
from peftkit.plan.decisions import DecisionLog
from peftkit.plan.plan import MethodPlan
from peftkit.plan.targets import (
    LayerPosition,
    layer_position,
    make_selection,
    resolve_items,
    resolve_layers,
    resolve_parameters,
    resolve_targets,
    resolve_whole,
)

_MAX_SHOWN_NAMES = 16
LOW_4BIT_SHARE = 0.5  # below this share in 4-bit, QLoRA saves little


def default_selection(method: Method, shape: ModelShape) -> Selection:
    """Return what a method adapts if the recipe does not say."""
    if method.default_roles is None:
        return Selection()
    roles, _ = method.default_roles(shape)
    modules, _ = resolve_targets(roles, shape, method, "method.targets")
    return make_selection(modules, shape, as_parameters=method.reaches_parameters)


def _resolve_selection(d: DecisionLog, shape: ModelShape, method: Method) -> Selection:
    options = d.loaded.recipe.method
    if not isinstance(options, TargetOptions) or method.default_roles is None:
        return Selection()
    targets_option = options.targets
    roles, reason = method.default_roles(shape)
    if targets_option == "auto" and not roles:
        return Selection()
    targets = roles if targets_option == "auto" else targets_option
    layers: set[LayerPosition] | None = None
    if options.layers is not None:
        layers, problems = resolve_layers(options.layers, (m.name for m in shape.modules), d.where("method.layers"))
        d.problems.extend(problems)
        if problems:
            return Selection()
    if targets_option == "auto":  # of what nobody named, what these layers lack is no mistake
        targets = [role for role in roles if resolve_targets(role, shape, method, "", layers=layers)[0]] or roles
    named = dict.fromkeys(options.exclude, True)
    everything, _ = resolve_targets(targets, shape, method, "", layers=layers)
    excluded, problems = resolve_items(named, everything, shape, d.where("method.exclude"))
    d.problems.extend(problems)
    if everything and len(excluded) == len(everything):
        d.refuse("method.exclude", "all of the targets", "some of them")
    where = d.where("method.targets")
    modules, problems = resolve_targets(targets, shape, method, where, layers=layers, exclude=excluded)
    d.problems.extend(problems)
    extra = getattr(d.loaded.recipe.method, "target_parameters", ())
    parameter_modules, problems = resolve_parameters(extra, shape, d.where("method.target_parameters"))
    d.problems.extend(problems)
    module_names = {module.name for module in (*modules, *parameter_modules)}
    modules = [module for module in shape.modules if module.name in module_names]
    selection = make_selection(modules, shape, as_parameters=method.reaches_parameters, by_parameter=parameter_modules)
    if isinstance(options, LoraOptions):
        ranks, rank_problems = resolve_items(options.rank_pattern, modules, shape, d.where("method.rank_pattern"))
        alphas, alpha_problems = resolve_items(options.alpha_pattern, modules, shape, d.where("method.alpha_pattern"))
        items = [item for item in options.also_train if isinstance(item, str) and item not in WHOLE_PARTS]
        whole, whole_problems = resolve_whole(items, shape, d.where("method.also_train"))
        d.problems.extend((*rank_problems, *alpha_problems, *whole_problems))
        if both := [part.name for part in whole if part.name in module_names]:
            d.refuse(
                "method.also_train", f"{both[0]}, which is adapted", "one of the two", "exclude it from the targets"
            )
        parts = tuple(part for part in whole if part.role not in options.also_train)  # norms: all of them already
        selection = replace(selection, ranks=ranks, alphas=alphas, whole=parts)
    # of many single layers only the kinds are shown: method.layers says which
    endings = [*selection.names, *selection.parameters]
    if len(endings) > _MAX_SHOWN_NAMES:
        endings = list(dict.fromkeys(map(wildcard_name, endings)))
    if targets_option == "auto":
        d.record("method.targets", targets_option, endings, reason)
    else:
        d.record("method.targets", endings)
    if "all-linear" in ([targets] if isinstance(targets, str) else targets):
        reasons: dict[str, list[str]] = {}
        for module in shape.modules:
            if module.blocked_reason:
                last = module.name.rsplit(".", 1)[-1]
                reasons.setdefault(module.blocked_reason, [])
                if last not in reasons[module.blocked_reason]:
                    reasons[module.blocked_reason].append(last)
        if reasons:
            names = [name for layer_names in reasons.values() for name in layer_names]
            why = "; ".join(f"{', '.join(layer_names)}: {reason}" for reason, layer_names in reasons.items())
            d.decide("method.left_out", names, why)
    return selection


def share_in_4bit(shape: ModelShape) -> float:
    """Return the share of parameters stored in 4-bit: matrices of linear layers and fused experts."""
    num_in_4bit = sum(max(1, m.num) * m.d_in * m.d_out for m in shape.modules if _in_4bit(m, shape))
    num_in_4bit += sum(t.num_parameters for t in shape.tensors if t.role == "shared adapters")  # linear too
    return num_in_4bit / shape.num_parameters


def _in_4bit(module: Module, shape: ModelShape) -> bool:
    return module.name.rsplit(".", 1)[-1] not in shape.family.skip_4bit


def largest_role_outside_4bit(shape: ModelShape) -> str:
    """Return the role with the most parameters outside 4-bit."""
    rest: dict[str, int] = {}
    for module in shape.modules:
        if not _in_4bit(module, shape):
            rest[module.role] = rest.get(module.role, 0) + module.num_parameters
    for tensor in shape.tensors:
        rest[tensor.role] = rest.get(tensor.role, 0) + tensor.num_parameters
    return max(rest, key=lambda role: rest[role])


def method_plan(d: DecisionLog, shape: ModelShape, num_steps: int | None) -> MethodPlan:
    """Resolve targets, check every option against the model, and count trainable parameters."""
    options = d.loaded.recipe.method
    method = METHODS[options.name]
    reason = refusal_reason(method, shape)
    if reason:
        alternative = nearest_method(method, shape)
        d.refuse(
            "method.name",
            f"{method.name} on {shape.family.name}",
            f"a method that works on {shape.family.name}",
            f"{reason}; the nearest that works: {alternative}",
        )
    selection = Selection() if reason else _resolve_selection(d, shape, method)
    d.record("method.name", method.name)
    recorded_names = {"name", "targets", "alpha"} if isinstance(options, LoraOptions) else {"name", "targets"}
    for name, value in options.model_dump(mode="json").items():
        if name not in recorded_names:
            d.record(f"method.{name}", value)
    rows: tuple[str, ...] = ()
    if isinstance(options, LoraOptions):
        d.record("method.alpha", options.alpha, options.scale_alpha, "2 x rank")
        tokens = [t for item in options.also_train if isinstance(item, TokenRows) for t in item.tokens]
        rows = tuple(dict.fromkeys([*tokens, *new_tokens(options)]))
    if not reason:
        for conflict in method.conflicts(options, shape, selection):
            d.refuse(f"method.{conflict.key}", conflict.got, conflict.expected, conflict.fix)
    if method.adds_penalty and (shape.task != "causal-lm" or shape.family.inferred):
        why = "the loss is computed from the logits here, and PEFT adds its penalty to the model's own loss"
        d.decide("method.penalty", 0, why)
    if num_steps is not None and num_steps < method.min_steps:
        got, fix = f"{num_steps} with {method.name}", "train longer, or use method lora"
        d.refuse("train.max_steps", got, f"at least {method.min_steps} steps", fix)
    if shape.family.inferred:
        d.decide("base.family", shape.family.name, shape.family.mind[0])
    trainable_by_role = None if d.problems else {k: v for k, v in method.count(options, shape, selection).items() if v}
    spec = None if d.problems else method.peft(options, shape, selection)
    if spec is not None and method.schedule is not None and num_steps is not None:
        spec = PeftSpec(spec.class_name, {**spec.arguments, **method.schedule(num_steps)})
    return MethodPlan(
        name=method.name,
        peft=spec,
        target_modules=selection.names,
        target_parameters=selection.parameters,
        token_rows=rows,
        lr_ratio=getattr(options, "lr_ratio", None),
        trainable_by_role=trainable_by_role,
        trainable_by_layers={} if d.problems else count_by_layers(method, options, shape, selection),
        num_parameters=shape.num_parameters,
        roles={wildcard_name(module.name): module.role for module in shape.modules},
        start_from=d.record("start_from", d.loaded.recipe.start_from),
    )


def refusal_reason(method: Method, shape: ModelShape) -> str:
    """Return why a method cannot work on a model; empty if it can."""
    reason = shape.family.refuses.get(method.name) or method.refuses(shape)
    if reason:
        return reason
    if method.default_roles is not None and not method.default_roles(shape)[0]:
        return f"none of its layers plays a role that {method.name} adapts"
    return ""


def nearest_method(method: Method, shape: ModelShape) -> str:
    """Return the method to use instead of one that is refused."""
    visited_names = {method.name}
    name = method.nearest
    while refusal_reason(METHODS[name], shape) and name not in visited_names:
        visited_names.add(name)
        name = METHODS[name].nearest
    return name


OUTSIDE_LAYERS, SHARED_BY_LAYERS = "outside the layers", "shared by the layers"


def count_by_layers(method: Method, options: object, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count trained parameters by range of equal layers, for example {"model.layers 0-31": 41943040}.

    Parameters outside the layers, or shared by all of them, are listed under those names. The sum equals that
    of `method.count`.
    """
    total = sum(method.count(options, shape, selection).values())
    if method.virtual_tokens:  # counted from the model's sizes, not from its modules
        return {SHARED_BY_LAYERS: total} if total else {}
    modules_in: dict[LayerPosition | None, list[Module]] = {}
    tensors_in: dict[LayerPosition | None, list[Tensor]] = {}
    for module in shape.modules:
        modules_in.setdefault(layer_position(module.name), []).append(module)
    for tensor in shape.tensors:
        tensors_in.setdefault(layer_position(tensor.name), []).append(tensor)
    adapted_names = {module.name for module in selection.modules}
    counts: dict[LayerPosition | None, int] = {}
    for layer in {**modules_in, **tensors_in}:
        modules = modules_in.get(layer, [])
        layer_shape = replace(shape, modules=tuple(modules), tensors=tuple(tensors_in.get(layer, ())))
        layer_selection = replace(
            selection,
            modules=tuple(m for m in modules if m.name in adapted_names),
            whole=tuple(part for part in selection.whole if layer_position(part.name) == layer),
        )
        counts[layer] = sum(method.count(options, layer_shape, layer_selection).values())
    empty_shape = replace(shape, modules=(), tensors=())
    constant = sum(method.count(options, empty_shape, Selection()).values())  # single token rows
    ranges = _merge_ranges({layer: num - constant for layer, num in counts.items() if layer is not None})
    rest = {OUTSIDE_LAYERS: counts.get(None, constant)}
    rest[SHARED_BY_LAYERS] = total - sum(ranges.values()) - rest[OUTSIDE_LAYERS]
    return {**ranges, **{name: num for name, num in rest.items() if num}}


def _merge_ranges(counts: Mapping[LayerPosition, int]) -> dict[str, int]:
    """Merge neighbouring layers with equal counts into ranges."""
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
