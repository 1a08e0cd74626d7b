"""IA3: learned vectors that rescale keys, values and feed-forward activations (Liu et al. 2022)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.archs import Family, ModelShape, Module, family_of
from peftkit.methods.base import Method, Options, PeftSpec, Targets, by_role


class Ia3Options(Options):
    """Scaling vectors: the fewest parameters of all methods here."""

    name: Literal["ia3"]
    targets: Targets = "auto"
    feedforward: list[str] | None = Field(
        None, description="module names among the targets that are scaled at their input, not output"
    )


def _feedforward(options: Ia3Options, shape: ModelShape | None) -> tuple[str, ...]:
    """The paper scales the input of the feed-forward's down projection; the family names that module."""
    if options.feedforward is not None:
        return tuple(options.feedforward)
    family = family_of(shape.model_type) if shape else None
    return family.ia3_feedforward if family else ()


def count(options: Ia3Options, shape: ModelShape, modules: tuple[Module, ...]) -> dict[str, int]:
    """d_in per feed-forward module, d_out per other module."""
    endings = tuple(f".{name}" for name in _feedforward(options, shape))
    return by_role(modules, lambda module: module.d_in if module.name.endswith(endings) else module.d_out)


def peft(options: Ia3Options, shape: ModelShape | None, targets: tuple[str, ...] | str) -> PeftSpec:
    """peft.IA3Config. Targets and feedforward_modules always go together: PEFT would scale outputs else."""
    inputs = _feedforward(options, shape)
    if isinstance(targets, str):
        return PeftSpec("IA3Config", {"target_modules": targets, "feedforward_modules": list(inputs)})
    chosen = [name for name in targets if name.endswith(inputs)]
    return PeftSpec("IA3Config", {"target_modules": list(targets), "feedforward_modules": chosen})


def learning_rate(num_parameters: int) -> tuple[float, str]:
    return 3e-3, "the IA3 paper's value (Liu et al. 2022, section 4)"


def default_targets(family: Family | None) -> tuple[tuple[str, ...] | str, str]:
    if family is None:
        return (), "no IA3 targets are known for this family: name them"
    return family.ia3_targets, f"keys, values and the feed-forward's output, as in the paper ({family.name})"


METHOD = Method(
    name="ia3",
    summary="learned scaling vectors",
    options=Ia3Options,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_targets=default_targets,
)
