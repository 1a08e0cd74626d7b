"""`method.targets` to modules of the model: roles, groups and names, each proven to match something."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.archs import ATTENTION_ROLES, EXPERT_ROLES, ModelShape, Module, shortest_names
from peftkit.archs.family import NOT_BY_DEFAULT
from peftkit.errors import Problem, nearest
from peftkit.methods import Method, Selection


def matches(module_name: str, target: str) -> bool:
    """PEFT's rule for a list of targets: the whole name, or an ending at a dot."""
    return module_name == target or module_name.endswith(f".{target}")


def unmatched(
    names: Sequence[str], targets: Sequence[str], where: str, *, what: str = "module"
) -> list[Problem]:
    """A problem for each target that reaches none of the `names`."""
    endings = sorted(
        {
            ".".join(name.split(".")[-depth:])
            for name in names
            for depth in (1, 2)
            if not name.split(".")[-1].isdigit()
        }
    )
    problems = []
    for target in targets:
        if not any(matches(name, target) for name in names):
            close = nearest(target, endings, count=3) or [e for e in endings if "." not in e][:8]
            problems.append(
                Problem(
                    where,
                    f"{target!r}, which matches no {what}",
                    f"a {what} of the model",
                    f"nearest: {', '.join(close)}",
                )
            )
    return problems


def _weight(module: Module) -> str:
    """The parameter behind a module that PEFT is to reach as a parameter."""
    return module.name if module.in_experts else f"{module.name}.weight"


def select(
    modules: Sequence[Module], shape: ModelShape, *, as_parameters: bool, named: Sequence[Module] = ()
) -> Selection:
    """How PEFT is told of these modules. `as_parameters`: its LoRA renames fused experts, so take weights.

    `named` are modules that the recipe wants reached by their parameters.
    """
    by_weight = [m for m in modules if m.in_experts or m in named or (as_parameters and m.by_parameter)]
    by_name = [m for m in modules if m not in by_weight]
    others = [tensor.name for tensor in shape.tensors]
    everything = [module.name for module in shape.modules] + others
    weights = [_weight(module) for module in shape.modules]
    return Selection(
        tuple(modules),
        shortest_names([m.name for m in by_name], everything),
        shortest_names([_weight(m) for m in by_weight], weights),
    )


def _group(item: str, shape: ModelShape) -> list[Module] | None:
    """The modules of a group or role; None where `item` is neither."""
    free = [m for m in shape.modules if not m.blocked]
    if item == "all-linear":
        return [m for m in free if m.role not in NOT_BY_DEFAULT]
    if item == "attention":
        return [m for m in free if m.role in ATTENTION_ROLES or m.role.startswith("ssm_in")]
    if item == "experts":
        return [m for m in free if m.role in EXPERT_ROLES]
    roles = {m.role for m in shape.modules}
    return [m for m in shape.modules if m.role == item] if item in roles else None


def _tables(shape: ModelShape) -> dict[str, str]:
    """Embeddings and head by name: they stand outside the blocks and are trained another way."""
    return {shape.family.embeddings: "embeddings", shape.family.head: "head"}


def resolve_parameters(
    names: Sequence[str], shape: ModelShape, where: str
) -> tuple[list[Module], list[Problem]]:
    """The modules behind parameters that the recipe names."""
    weights = {_weight(module): module for module in shape.modules}
    found = [m for weight, m in weights.items() if any(matches(weight, name) for name in names)]
    return found, unmatched(list(weights), names, where, what="parameter")


def _no_such(item: str, shape: ModelShape, where: str) -> Problem:
    roles = ", ".join(dict.fromkeys(m.role for m in shape.modules if not m.blocked))
    names = [module.name for module in shape.modules]
    [problem] = unmatched(names, [item], where)
    fix = f"roles of {shape.family.name}: {roles}; {problem.fix}"
    return Problem(where, problem.got, "a role or module of the model", fix)


def _named(item: str, shape: ModelShape, where: str) -> tuple[list[Module], list[Problem]]:
    """The modules under an explicit name, and what is wrong with it."""
    found = [m for m in shape.modules if matches(m.name, item)]
    table = next((kind for name, kind in _tables(shape).items() if name == item), None)
    if table is not None:
        fix = f"also_train: [{table}] trains it whole" + (
            "; {tokens: [...]} trains single rows and keeps the tie" if shape.tied_embeddings else ""
        )
        return [], [Problem(where, f"{item!r}, the model's {table}", "a layer inside the blocks", fix)]
    if not found:
        return [], [_no_such(item, shape, where)]
    return found, []


def resolve_targets(
    wanted: str | Sequence[str], shape: ModelShape, method: Method, where: str
) -> tuple[list[Module], list[Problem]]:
    """The modules that the recipe asks for, in model order, and what is wrong with the request."""
    chosen: set[str] = set()
    problems: list[Problem] = []
    for item in [wanted] if isinstance(wanted, str) else wanted:
        group = _group(item, shape)
        modules, bad = (group, []) if group is not None else _named(item, shape, where)
        problems += bad
        if group == []:
            problems.append(_no_such(item, shape, where))
        blocked = [m for m in modules if m.blocked]
        if blocked:
            fix = "leave it out; the default targets are those that work"
            problems.append(
                Problem(where, f"{item!r}: {blocked[0].blocked}", "modules that can be adapted", fix)
            )
        fused = [m for m in modules if m.in_experts]
        if fused and not method.reaches_parameters:
            problems.append(
                Problem(
                    where,
                    f"{item!r} with {method.name}",
                    "layers of their own",
                    f"{fused[0].role} is a fused parameter, which only LoRA reaches: use method lora",
                )
            )
        chosen |= {m.name for m in modules}
    return [m for m in shape.modules if m.name in chosen], problems
