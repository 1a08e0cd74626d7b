"""Where an escalation goes: to the rung that the evidence names, in one move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.diagnose.causes import Cause
from peftkit.diagnose.signals import Signals

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
USUAL_RANK = 16  # a smaller one grows to it at least
SMALL_RANK = 4  # smaller than anyone would take where capacity matters
BITS_PER_PARAMETER = 2.0  # what a trained weight can hold (Allen-Zhu and Li 2024; Schulman et al. 2025)
WORTHWHILE = 0.01  # of the energy in layers without an adapter: a role below it is left out
EARLY_RANK = 64  # an early growth costs no steps: it goes at once to where rank is no longer what is lacking
UNTRAINED = 0.02  # of what is learnt: so much in tokens without a trained row is not for layers to mend
MOST_TOKENS = 512  # single rows to train; beyond, the whole table


@dataclass(frozen=True)
class Rung:
    """A larger adapter: the cause that it mends, its roles (empty: as before), its rank, and why.

    `tokens` are those whose rows are trained as well, `also_train` other parts of the model.
    """

    cause: Cause
    roles: tuple[str, ...]
    rank: int
    said: str
    tokens: tuple[str, ...] = ()
    also_train: tuple[str, ...] = ()


@dataclass(frozen=True)
class Untrained:
    """Tokens that are learnt and whose rows in the head look untrained, and their share of what is learnt."""

    tokens: tuple[str, ...] = ()
    share: float = 0.0


def rank_for(num_learnt: int, loss: float, per_rank: int, *, least: int, most: int) -> int:
    """The rung whose adapter holds what the data tells: `num_learnt` tokens of `loss` nats.

    `per_rank` are the parameters of an adapter of rank 1. Never below `least` or above `most`.
    """
    bits = num_learnt * loss / math.log(2)
    enough = bits / BITS_PER_PARAMETER / max(1, per_rank)
    wanted = next((rank for rank in RANKS if rank >= enough), RANKS[-1])
    return max(least, min(most, wanted))


def next_rung(
    signals: Signals,
    *,
    rank: int,
    adapted: Sequence[str],
    max_rank: int,
    num_learnt: int,
    loss: float,
    untrained: Untrained = Untrained(),
    early: bool = False,
) -> Rung | None:
    """The next rung by the signals; None where there is none within the bound.

    `adapted` are the roles with an adapter now. Tokens that nothing has trained come first, as no layer makes
    up for them; then modules before rank: at equal parameters they bring far more wherever it was measured.
    `early` in a run, the move goes at once to the rank that the data can fill.
    """
    if untrained.share >= UNTRAINED:
        said = (
            f"{untrained.share:.0%} of what is learnt is in {len(untrained.tokens)} tokens of untrained rows"
        )
        if len(untrained.tokens) > MOST_TOKENS:
            return Rung("embeddings or head", (), rank, said, also_train=("embeddings",))
        return Rung("embeddings or head", (), rank, said, tokens=untrained.tokens)
    enough = (num_learnt, loss) if early else None
    if signals.unadapted > signals.residual:
        return _more_modules(signals, rank, adapted, max_rank, enough)
    most = _most(signals, max_rank)
    if rank >= most:
        return None
    per_rank = sum(m.num_parameters_per_rank for m in signals.modules if m.is_adapted)
    least = min(most, max(2 * rank, USUAL_RANK))
    grown = rank_for(*enough, per_rank, least=least, most=most) if enough else least
    beyond = signals.residual / (signals.residual + signals.tangent) if signals.residual > 0 else 0.0
    said = f"{beyond:.0%} of the gradients' energy lies beyond what rank {rank} can express"
    return Rung("rank", (), grown, said)


def _most(signals: Signals, max_rank: int) -> int:
    """The largest rank: within the bound, and below half of a full layer's."""
    narrowest = min(m.narrowest for m in signals.modules) if signals.modules else max_rank
    return min(max_rank, max(1, narrowest // 2))


def _more_modules(
    signals: Signals, rank: int, adapted: Sequence[str], max_rank: int, enough: tuple[int, float] | None
) -> Rung:
    """Adapters on the roles that are worth it; `enough` are the tokens and the loss to be held, early on."""
    ranked = signals.by_worth()
    best = ranked[0][1]
    shares = signals.shares()
    chosen = tuple(role for role, _ in ranked if shares[role] >= WORTHWHILE)
    members = {*adapted, *chosen}
    per_rank = sum(m.num_parameters_per_rank for m in signals.modules if m.role in members)
    most = max(rank, _most(signals, max_rank))
    least = max(rank, min(most, EARLY_RANK if enough else USUAL_RANK))
    grown = rank_for(*enough, per_rank, least=least, most=most) if enough else least
    shown = ", ".join(f"{role} {one / best:.2f}" for role, one in ranked)
    where = f"lies in layers without an adapter (per parameter: {shown})"
    said = f"{signals.share_unadapted:.0%} of the gradients' energy {where}"
    return Rung("target modules", (*adapted, *chosen), grown, said)
