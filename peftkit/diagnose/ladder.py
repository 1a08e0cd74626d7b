"""Where an escalation goes: to the rung that the evidence names, in one move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.diagnose.causes import Cause
from peftkit.diagnose.signals import Signals

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BITS_PER_PARAMETER = 2.0  # what a trained weight can hold (Allen-Zhu and Li 2024; Schulman et al. 2025)
WORTHWHILE = 0.1  # of the best role's energy per parameter: a role below it is left out
HEAD_STANDS_OUT = 4.0  # times the energy per parameter of all linear layers


@dataclass(frozen=True)
class Rung:
    """A larger adapter: the cause that it mends, its roles (empty: as before), its rank, and why."""

    cause: Cause
    roles: tuple[str, ...]
    rank: int
    also_train: tuple[str, ...]
    said: str


def rank_for(num_learnt: int, loss: float, per_rank: int, *, least: int, most: int) -> int:
    """The rung whose adapter holds what the data tells: `num_learnt` tokens of `loss` nats.

    `per_rank` are the parameters of an adapter of rank 1. Never below `least` or above `most`.
    """
    bits = num_learnt * loss / math.log(2)
    enough = bits / BITS_PER_PARAMETER / max(1, per_rank)
    wanted = next((rank for rank in RANKS if rank >= enough), RANKS[-1])
    return max(least, min(most, wanted))


def next_rung(
    signals: Signals, *, rank: int, adapted: Sequence[str], max_rank: int, num_learnt: int, loss: float
) -> Rung | None:
    """The next rung by the signals; None where there is none within the bound.

    `adapted` are the roles with an adapter now. Modules come before rank: at equal parameters they bring far
    more wherever it was measured.
    """
    linear = signals.tangent + signals.residual + signals.unadapted
    size = sum(m.num_parameters_per_rank for m in signals.modules)
    if signals.head_parameters and size and linear > 0:
        per_head, per_linear = signals.head / signals.head_parameters, linear / size
        if per_head > HEAD_STANDS_OUT * per_linear:
            said = f"the head's energy per parameter is {per_head / per_linear:.1f} times the layers'"
            return Rung("embeddings or head", (), rank, ("embeddings",), said)
    if signals.unadapted > signals.residual:
        ranked = signals.by_worth()
        best = ranked[0][1]
        chosen = tuple(role for role, one in ranked if one >= WORTHWHILE * best)
        members = {*adapted, *chosen}
        per_rank = sum(m.num_parameters_per_rank for m in signals.modules if m.role in members)
        grown = rank_for(num_learnt, loss, per_rank, least=rank, most=max(rank, max_rank))
        shown = ", ".join(f"{role} {one / best:.2f}" for role, one in ranked)
        share = signals.unadapted / (signals.unadapted + signals.residual + signals.tangent)
        said = (
            f"{share:.0%} of the gradients' energy lies in layers without an adapter (per parameter: {shown})"
        )
        return Rung("target modules", (*adapted, *chosen), grown, (), said)
    if rank >= max_rank:
        return None
    per_rank = sum(m.num_parameters_per_rank for m in signals.modules if m.is_adapted)
    grown = rank_for(num_learnt, loss, per_rank, least=min(max_rank, 2 * rank), most=max_rank)
    beyond = signals.residual / (signals.residual + signals.tangent) if signals.residual > 0 else 0.0
    said = f"{beyond:.0%} of the gradients' energy lies beyond what rank {rank} can express"
    return Rung("rank", (), grown, (), said)
