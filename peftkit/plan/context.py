"""Context length: what the model was trained on, and what RoPE scaling makes of it."""

from __future__ import annotations

from typing import Any

from peftkit.archs import ModelShape
from peftkit.plan.decisions import Decisions

_USUAL_LENGTH = 2048


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
    if shape.positions != "rope":
        d.refuse(
            "base.rope_scaling",
            f"RoPE scaling on {shape.family.name}",
            "a family with rotary positions",
            f"its positions are: {shape.positions}",
        )
        return {}
    if shape.rope_type != "default":
        d.refuse(
            "base.rope_scaling",
            f"RoPE scaling on a base that stretches its positions already ({shape.rope_type})",
            "one stretching",
            "its trained positions count that in: leave rope_scaling out",
        )
        return {}
    d.keep("base.rope_scaling.kind", scaling.kind)
    d.keep("base.rope_scaling.factor", scaling.factor)
    return {"rope_scaling": {"kind": scaling.kind, "factor": scaling.factor, "trained": shape.dims.positions}}


def choose_max_length(d: Decisions, shape: ModelShape, virtual_tokens: int) -> int:
    """Tokens per row: as written, or 2048 where the model has so many positions. Refuses more than it has.

    Learned positions stand for virtual tokens too; rotary ones were trained on no more.
    """
    limit = context_length(d, shape)
    room = limit - virtual_tokens
    behind = f", behind {virtual_tokens} virtual tokens" if virtual_tokens else ""
    wanted = d.loaded.recipe.train.max_length
    if limit and room < 1:
        d.refuse("method.virtual_tokens", str(virtual_tokens), f"fewer than the model's {limit} positions")
        return _USUAL_LENGTH
    best = min(_USUAL_LENGTH, room) if limit else _USUAL_LENGTH
    why = f"all of the model's {limit} positions{behind}" if best < _USUAL_LENGTH else "usual for tuning"
    max_length = int(d.keep("train.max_length", wanted, best, why))
    if not limit or max_length <= room:
        return max_length
    factor = -(-(max_length + virtual_tokens) // shape.dims.positions)
    if shape.positions != "rope" or shape.rope_type != "default":
        fix = "the model was trained on no more positions"
    elif d.loaded.recipe.base.rope_scaling:
        fix = f"raise base.rope_scaling.factor to {factor}"
    else:
        fix = f"shorten, or set base.rope_scaling: {{kind: yarn, factor: {factor}}}"
    expected = f"at most {room}, the positions it was trained on{behind}"
    d.refuse("train.max_length", str(max_length), expected, fix)
    return max_length
