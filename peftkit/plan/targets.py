"""`method.targets` to module names: roles, groups and explicit names, each proven to match something."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.archs import Family, Module
from peftkit.archs.families import ATTENTION_ROLES
from peftkit.errors import Problem, nearest

Names = tuple[str, ...]


def matches(module_name: str, target: str) -> bool:
    """PEFT's rule for a list of targets: the whole name, or an ending at a dot."""
    return module_name == target or module_name.endswith(f".{target}")


def targeted(modules: Sequence[Module], targets: Names | str) -> tuple[Module, ...]:
    """The modules that `targets` reaches."""
    if targets == "all-linear":
        return tuple(modules)
    return tuple(module for module in modules if any(matches(module.name, name) for name in targets))


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


def resolve_targets(wanted: str | Sequence[str], family: Family, where: str) -> tuple[Names, list[Problem]]:
    """Module names for what the recipe asks, for a known family, and what is wrong with it.

    `wanted` is "attention", "all-linear", a role, a name, or a list of roles and names.
    """
    items = [wanted] if isinstance(wanted, str) else list(wanted)
    every = family.targets
    found: list[str] = []
    problems: list[Problem] = []
    for item in items:
        if item == "all-linear":
            found.extend(every)
        elif item == "attention":
            found.extend(name for role in ATTENTION_ROLES for name in family.roles.get(role, ()))
        elif item in family.roles:
            found.extend(family.roles[item])
        else:
            full = [f"{family.block.format(i=0)}.{linear.name}" for linear in family.linears]
            known = [*full, f"x.{family.embeddings}", f"x.{family.head}"]
            bad = [] if _is_numbered(item) else unmatched(known, [item], where)
            roles = f"; roles of {family.name}: {', '.join(family.roles)}"
            problems.extend(
                Problem(p.where, p.got, "a role or module of the model", p.fix + roles) for p in bad
            )
            found.append(item)
    return tuple(dict.fromkeys(found)), problems


def _is_numbered(name: str) -> bool:
    """Names a single layer (layers.3.self_attn.q_proj): proven once the model is loaded."""
    return any(part.isdigit() for part in name.split("."))
