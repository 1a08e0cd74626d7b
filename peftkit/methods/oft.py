"""OFT: block-diagonal rotations of a layer's input (Qiu et al. 2023)."""

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
    linear_roles,
)


class OftOptions(Options):
    """Orthogonal rotations: the angles between neurons are kept."""

    name: Literal["oft"]
    block_size: int = Field(
        32, ge=2, lt=2**31, description="width of the rotated blocks; must divide every input"
    )
    targets: Targets = "auto"
    dropout: float = Field(0.0, ge=0, lt=1, description="chance that a block is left alone in a step")


def _size(module: Module, block: int) -> int:
    return module.d_in // block * (block * (block - 1) // 2)


def count(options: OftOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """d_in / block rotations of block (block - 1) / 2 angles per module."""
    return {**by_role(selection.modules, lambda m: _size(m, options.block_size)), **count_head(shape)}


def peft(options: OftOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """peft.OFTConfig."""
    arguments = {
        "r": 0,
        "oft_block_size": options.block_size,
        "module_dropout": options.dropout,
        "target_modules": list(selection.names),
        **head_arguments(shape),
    }
    return PeftSpec("OFTConfig", arguments)


def learning_rate(num_parameters: int) -> tuple[float, str]:
    return (
        4e-4,
        "twice LoRA's for 7B to 13B, as rotations move slowly: a rule of thumb, not measured at scale",
    )


def conflicts(options: OftOptions, shape: ModelShape, selection: Selection) -> Iterator[Conflict]:
    """PEFT would adjust a block size that does not divide, and only warn."""
    odd = [module for module in selection.modules if module.d_in % options.block_size]
    if odd:
        largest = min(options.block_size, *(m.d_in for m in selection.modules), odd[0].d_in)
        fits = [b for b in range(largest, 1, -1) if all(m.d_in % b == 0 for m in selection.modules)]
        fix = f"try block_size: {fits[0]}" if fits else "leave that layer out of method.targets"
        got = f"{options.block_size}, which does not divide the {odd[0].d_in} inputs of {odd[0].name}"
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
