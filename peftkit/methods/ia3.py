"""IA3: trained vectors that rescale keys, values and feed-forward activations (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.archs import ModelShape, Module
from peftkit.methods.base import (
    Conflict,
    Excluded,
    Layers,
    Method,
    Options,
    PeftSpec,
    RunSize,
    Selection,
    Targets,
    count_head,
    head_arguments,
    sum_by_role,
)

_DEFAULT_ROLES = ("k", "v", "kv_b", "qkv", "ssm_in", "down")


class Ia3Options(Options):
    """Scaling vectors: the fewest parameters of all methods here."""

    name: Literal["ia3"]
    targets: Targets = "auto"
    layers: Layers = None
    exclude: Excluded = Field([])
    feedforward: list[str] | None = Field(
        None, description="module names among the targets that are scaled at their input, not output"
    )


def _matches_any(module: Module, names: tuple[str, ...]) -> bool:
    return any(module.name == name or module.name.endswith(f".{name}") for name in names)


def _input_scaled_names(options: Ia3Options, selection: Selection) -> tuple[str, ...]:
    """Return the target names scaled at their input: by default the feed-forward's down projections."""
    if options.feedforward is not None:
        return tuple(options.feedforward)
    down_modules = [module for module in selection.modules if module.role == "down"]
    other_modules = [module for module in selection.modules if module.role != "down"]
    return tuple(
        name
        for name in selection.names
        if any(_matches_any(m, (name,)) for m in down_modules)
        and not any(_matches_any(m, (name,)) for m in other_modules)
    )


def count(options: Ia3Options, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count d_in per feed-forward module, d_out per other module."""
    inputs = _input_scaled_names(options, selection)
    counts = sum_by_role(selection.modules, lambda m: m.d_in if _matches_any(m, inputs) else m.d_out)
    return {**counts, **count_head(shape)}


def peft(options: Ia3Options, shape: ModelShape, selection: Selection) -> PeftSpec:
    """Build peft.IA3Config.

    Targets and feedforward_modules always go together: without the latter PEFT would scale outputs.
    """
    arguments = {
        "target_modules": list(selection.names),
        "feedforward_modules": list(_input_scaled_names(options, selection)),
        **head_arguments(shape),
    }
    return PeftSpec("IA3Config", arguments)


def learning_rate(options: Ia3Options, shape: ModelShape, size: RunSize) -> tuple[float, str]:
    return 3e-3, "the IA3 paper's value (Liu et al. 2022, section 4)"


def default_roles(shape: ModelShape) -> tuple[tuple[str, ...], str]:
    """Return the roles of keys, values and the feed-forward's output, as the family names them."""
    roles = {module.role for module in shape.modules if not module.blocked_reason and not module.in_experts}
    return tuple(role for role in _DEFAULT_ROLES if role in roles), "keys, values and the feed-forward, as in the paper"


def conflicts(options: Ia3Options, shape: ModelShape, selection: Selection) -> Iterator[Conflict]:
    """Yield a conflict for each feed-forward name outside the targets, which PEFT would ignore silently."""
    for name in options.feedforward or ():
        if not any(target == name or target.endswith(f".{name}") for target in selection.names):
            yield Conflict(
                "feedforward",
                f"{name!r}, which is not among the targets",
                f"one of {', '.join(selection.names)}",
                f"add {name} to method.targets",
            )


METHOD = Method(
    name="ia3",
    summary="trained scaling vectors",
    options=Ia3Options,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_roles=default_roles,
    conflicts=conflicts,
)
