"""Resolution of `method.targets` to modules: roles, groups and names, each proven to match something."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.archs import ATTENTION_ROLES, EXPERT_ROLES, ModelShape, Module, shortest_names
from peftkit.archs.family import ROLES_NOT_BY_DEFAULT
from peftkit.errors import Problem, nearest
from peftkit.methods import Method, Selection


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


def _unknown_target(item: str, shape: ModelShape, where: str) -> Problem:
    roles = ", ".join(dict.fromkeys(m.role for m in shape.modules if not m.blocked_reason))
    names = [module.name for module in shape.modules]
    [problem] = unmatched_targets(names, [item], where)
    fix = f"roles of {shape.family.name}: {roles}; {problem.fix}"
    return Problem(where, problem.got, "a role or module of the model", fix)


def _modules_named(item: str, shape: ModelShape, where: str) -> tuple[list[Module], list[Problem]]:
    """Return the modules under an explicit name, and problems with it."""
    modules = [m for m in shape.modules if matches_target(m.name, item)]
    table = next(
        (
            kind
            for name, kind in {shape.family.embeddings: "embeddings", shape.family.head: "head"}.items()
            if name == item
        ),
        None,
    )
    if table is not None:
        fix = f"also_train: [{table}] trains it whole" + (
            "; {tokens: [...]} trains single rows and keeps the tie" if shape.tied_embeddings else ""
        )
        return [], [Problem(where, f"{item!r}, the model's {table}", "a layer inside the blocks", fix)]
    if not modules:
        return [], [_unknown_target(item, shape, where)]
    return modules, []


def resolve_targets(
    targets: str | Sequence[str], shape: ModelShape, method: Method, where: str
) -> tuple[list[Module], list[Problem]]:
    """Return the modules that the recipe asks for, in model order, and problems with the request."""
    module_names: set[str] = set()
    problems: list[Problem] = []
    for item in [targets] if isinstance(targets, str) else targets:
        adaptable = [m for m in shape.modules if not m.blocked_reason]
        if item == "all-linear":
            group: list[Module] | None = [m for m in adaptable if m.role not in ROLES_NOT_BY_DEFAULT]
        elif item == "attention":
            group = [m for m in adaptable if m.role in ATTENTION_ROLES or m.role.startswith("ssm_in")]
        elif item == "experts":
            group = [m for m in adaptable if m.role in EXPERT_ROLES]
        else:
            roles = {m.role for m in shape.modules}
            group = [m for m in shape.modules if m.role == item] if item in roles else None
        modules = group or []
        if group is None:
            modules, name_problems = _modules_named(item, shape, where)
            problems += name_problems
        if group == []:
            problems.append(_unknown_target(item, shape, where))
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
