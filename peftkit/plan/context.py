"""Context length: what the model was trained on, and what RoPE scaling makes of it."""

from __future__ import annotations

from typing import Any

from peftkit.archs import ModelShape
from peftkit.plan.decisions import Decisions


def context_length(d: Decisions, shape: ModelShape) -> int:
    """Positions that the model can tell apart: the trained ones, times the RoPE factor; 0: no limit."""
    scaling = d.loaded.recipe.base.rope_scaling
    return int(shape.dims.positions * scaling.factor) if scaling else shape.dims.positions


def rope_overrides(d: Decisions, shape: ModelShape) -> dict[str, Any]:
    """The configuration's entries for the recipe's RoPE scaling.

    linear: positions divided by the factor (Chen et al. 2023); dynamic: the base grows with the length (NTK);
    yarn: frequencies interpolated by wavelength (Peng et al. 2023).
    """
    scaling = d.loaded.recipe.base.rope_scaling
    if scaling is None:
        return {}
    if shape.family.positions != "rope":
        d.refuse(
            "base.rope_scaling",
            f"RoPE scaling on {shape.family.name}",
            "a family with rotary positions",
            f"its positions are: {shape.family.positions}",
        )
        return {}
    d.keep("base.rope_scaling.kind", scaling.kind)
    d.keep("base.rope_scaling.factor", scaling.factor)
    return {"rope_scaling": {"kind": scaling.kind, "factor": scaling.factor, "trained": shape.dims.positions}}


def context_problems(d: Decisions, shape: ModelShape, max_length: int) -> None:
    """Refuse rows longer than the model can tell positions apart."""
    limit = context_length(d, shape)
    if not limit or max_length <= limit:
        return
    if shape.family.positions != "rope":
        fix = "the model was trained on no more positions"
    elif d.loaded.recipe.base.rope_scaling:
        fix = f"raise base.rope_scaling.factor to {-(-max_length // shape.dims.positions)}"
    else:
        factor = -(-max_length // shape.dims.positions)
        fix = f"shorten, or set base.rope_scaling: {{kind: yarn, factor: {factor}}}"
    d.refuse("train.max_length", str(max_length), f"at most {limit}, the positions it was trained on", fix)
