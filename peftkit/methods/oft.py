"""OFT: block-diagonal rotations of a layer's input (Qiu et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.archs import ModelShape
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
    linear_roles,
    sum_by_role,
)


class OftOptions(Options):
    """Orthogonal rotations: the angles between neurons are kept."""

    name: Literal["oft"]
    block_size: int = Field(32, ge=2, lt=2**31, description="width of the rotated blocks; must divide every input")
    targets: Targets = "auto"
    layers: Layers = None
    exclude: Excluded = Field([])
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a block is skipped in a step")


def count(options: OftOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count d_in / block rotations of block * (block - 1) / 2 angles per module."""
    return {
        **sum_by_role(
            selection.modules,
            lambda m: m.d_in // options.block_size * (options.block_size * (options.block_size - 1) // 2),
        ),
        **count_head(shape),
    }


def peft(options: OftOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """Build peft.OFTConfig."""
    arguments = {
        "r": 0,
        "oft_block_size": options.block_size,
        "module_dropout": options.dropout,
        "target_modules": list(selection.names),
        **head_arguments(shape),
    }
    return PeftSpec("OFTConfig", arguments)


def learning_rate(options: OftOptions, shape: ModelShape, size: RunSize) -> tuple[float, str]:
    return (4e-4, "twice LoRA's for 7B to 13B, as rotations move slowly: a rule of thumb, not measured at scale")


def conflicts(options: OftOptions, shape: ModelShape, selection: Selection) -> Iterator[Conflict]:
    """Yield a conflict if the block size does not divide an input; PEFT would change it with a warning."""
    indivisible = [module for module in selection.modules if module.d_in % options.block_size]
    if indivisible:
        largest = min(options.block_size, *(m.d_in for m in selection.modules), indivisible[0].d_in)
        block_sizes = [b for b in range(largest, 1, -1) if all(m.d_in % b == 0 for m in selection.modules)]
        fix = f"try block_size: {block_sizes[0]}" if block_sizes else "leave that layer out of method.targets"
        got = f"{options.block_size}, which does not divide the {indivisible[0].d_in} inputs of {indivisible[0].name}"
        yield Conflict("block_size", got, "a divisor of every input", fix)


METHOD = Method(
    name="oft",
    summary="block-diagonal rotations",
    options=OftOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_roles=linear_roles,
    conflicts=conflicts,
)
