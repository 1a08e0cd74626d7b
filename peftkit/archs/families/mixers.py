"""Mixers of state-space layers: Mamba and Mamba-2."""

from __future__ import annotations

from collections.abc import Callable

from peftkit.archs.families.pieces import FUSED_KERNEL, NEVER_CALLED, rms
from peftkit.archs.family import BlockPart, Linear, Weight
from peftkit.archs.sizes import Sizes

PACKING_NOTE = "packed documents see each other: the state is carried from one to the next"
KERNELS = ("mamba_ssm", "causal_conv1d")
IN_PROJ_NOTE = "only in_proj is always called as a layer: it is the one state projection that is adapted"


def mamba(place: str, *, kind: str = "", has_norms: bool = False, bias: str = "mamba_proj_bias") -> BlockPart:
    """Build a Mamba mixer (Gu and Dao 2023)."""
    weights: tuple[Weight, ...] = (
        Weight(f"{place}.A_log", "inner*state", "states"),
        Weight(f"{place}.D", "inner", "states"),
        Weight(f"{place}.conv1d", "inner*kernel+inner", "states"),
    )
    if has_norms:
        weights += (
            rms(f"{place}.dt_layernorm", "dt_rank"),
            rms(f"{place}.b_layernorm", "state"),
            rms(f"{place}.c_layernorm", "state"),
        )
    return BlockPart(
        (
            Linear(f"{place}.in_proj", "ssm_in", "hidden", "2*inner", bias),
            Linear(f"{place}.x_proj", "ssm_x", "inner", "dt_rank+2*state", blocked_reason=FUSED_KERNEL),
            Linear(f"{place}.dt_proj", "ssm_dt", "dt_rank", "inner", True, blocked_reason=NEVER_CALLED),
            Linear(f"{place}.out_proj", "ssm_out", "inner", "hidden", bias, blocked_reason=FUSED_KERNEL),
        ),
        weights,
        kind=kind,
        state="inner*state+inner*kernel",
    )


def mamba2(place: str, *, kind: str = "", norm: bool = True, bias: str = "mamba_proj_bias") -> BlockPart:
    """Build a Mamba-2 mixer (Dao and Gu 2024)."""
    weights = (
        Weight(f"{place}.A_log", "ssm_heads", "states"),
        Weight(f"{place}.D", "ssm_heads", "states"),
        Weight(f"{place}.dt_bias", "ssm_heads", "states"),
        Weight(f"{place}.conv1d", "(inner+2*groups*state)*(kernel+1)", "states"),
    )
    return BlockPart(
        (
            Linear(f"{place}.in_proj", "ssm_in", "hidden", "2*inner+2*groups*state+ssm_heads", bias),
            Linear(f"{place}.out_proj", "ssm_out", "inner", "hidden", bias, blocked_reason=FUSED_KERNEL),
        ),
        (*weights, Weight(f"{place}.norm", "inner", "gated norms")) if norm else weights,
        kind=kind,
        state="inner*state+(inner+2*groups*state)*kernel",
    )


def dt_rank(key: str) -> Callable[[Sizes], int]:
    """Return a size function for the step projection's rank: as written, or ceil(hidden / 16)."""

    def value(sizes: Sizes) -> int:
        return -(-sizes["hidden"] // 16) if sizes.key(key) in {None, "auto"} else sizes[key]

    return value
