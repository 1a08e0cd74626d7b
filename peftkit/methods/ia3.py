"""IA3: learned vectors that rescale keys, values and feed-forward activations (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.archs import ModelShape, Module
from peftkit.methods.base import (
    Conflict,
    Method,
    Options,
    PeftSpec,
    Selection,
    Targets,
    by_role,
    count_head,
    head_arguments,
)

_SCALED = ("k", "v", "kv_b", "qkv", "ssm_in", "down")


class Ia3Options(Options):
    """Scaling vectors: the fewest parameters of all methods here."""

    name: Literal["ia3"]
    targets: Targets = "auto"
    feedforward: list[str] | None = Field(
        None, description="module names among the targets that are scaled at their input, not output"
    )


def _named(module: Module, names: tuple[str, ...]) -> bool:
    return any(module.name == name or module.name.endswith(f".{name}") for name in names)


def _inputs(options: Ia3Options, selection: Selection) -> tuple[str, ...]:
    """Target names whose input is scaled: by default those of the feed-forward's down projection."""
    if options.feedforward is not None:
        return tuple(options.feedforward)
    down = [module for module in selection.modules if module.role == "down"]
    others = [module for module in selection.modules if module.role != "down"]
    return tuple(
        name
        for name in selection.names
        if any(_named(m, (name,)) for m in down) and not any(_named(m, (name,)) for m in others)
    )


def count(options: Ia3Options, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """d_in per feed-forward module, d_out per other module."""
    inputs = _inputs(options, selection)
    scaled = by_role(selection.modules, lambda m: m.d_in if _named(m, inputs) else m.d_out)
    return {**scaled, **count_head(shape)}


def peft(options: Ia3Options, shape: ModelShape, selection: Selection) -> PeftSpec:
    """peft.IA3Config. Targets and feedforward_modules always go together: PEFT would scale outputs else."""
    arguments = {
        "target_modules": list(selection.names),
        "feedforward_modules": list(_inputs(options, selection)),
        **head_arguments(shape),
    }
    return PeftSpec("IA3Config", arguments)


def learning_rate(num_parameters: int) -> tuple[float, str]:
    return 3e-3, "the IA3 paper's value (Liu et al. 2022, section 4)"


def default_roles(shape: ModelShape) -> tuple[tuple[str, ...], str]:
    """Keys, values and the feed-forward's output, under the names that a family has for them."""
    roles = {module.role for module in shape.modules if not module.blocked and not module.in_experts}
    return tuple(
        role for role in _SCALED if role in roles
    ), "keys, values and the feed-forward, as in the paper"


def conflicts(options: Ia3Options, shape: ModelShape, selection: Selection) -> Iterator[Conflict]:
    """PEFT would drop a feed-forward name that is not targeted without a word."""
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
    summary="learned scaling vectors",
    options=Ia3Options,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_roles=default_roles,
    conflicts=conflicts,
)
