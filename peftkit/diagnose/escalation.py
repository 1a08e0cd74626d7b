"""The ladder of larger adapters: the rung that the evidence names, reached in one move."""

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
MIN_ROLE_SHARE = 0.01  # of the energy in layers without an adapter: a role below it is left out
EARLY_RANK = 64  # an early growth costs no steps: it goes at once to where rank is no longer what is lacking
MIN_UNTRAINED_SHARE = 0.02  # of what is learnt: so much in tokens without a trained row is not for layers to mend
MAX_TOKEN_ROWS = 512  # single rows to train; beyond, the whole table


@dataclass(frozen=True)
class Rung:
    """A larger adapter: the cause that it fixes, its roles (empty: as before), its rank, and the reason.

    `tokens` are those whose rows are trained as well, `also_train` other parts of the model.
    """

    cause: Cause
    roles: tuple[str, ...]
    rank: int
    said: str
    tokens: tuple[str, ...] = ()
    also_train: tuple[str, ...] = ()


@dataclass(frozen=True)
class UntrainedTokens:
    """Tokens in the loss whose rows in the head look untrained, and their share of the loss tokens."""

    tokens: tuple[str, ...] = ()
    share: float = 0.0


def rank_for(num_loss_tokens: int, loss: float, per_rank: int, *, min_rank: int, max_rank: int) -> int:
    """Return the rung whose adapter can hold the information of the data, within [min_rank, max_rank].

    bits = num_loss_tokens * loss / ln 2;  rank >= bits / (BITS_PER_PARAMETER * per_rank)

    `loss` is in nats per token; `per_rank` is the number of parameters of an adapter of rank 1.

    rank_for(1_000_000, 1.0, 100_000, min_rank=16, max_rank=256)
    # 1.44 million bits / 2 bits per parameter / 100,000 = 7.2: rung 8, raised to min_rank
    -> 16
    """
    bits = num_loss_tokens * loss / math.log(2)
    needed_rank = bits / BITS_PER_PARAMETER / max(1, per_rank)
    fitting_rank = next((rank for rank in RANKS if rank >= needed_rank), RANKS[-1])
    return max(min_rank, min(max_rank, fitting_rank))


def next_rung(
    signals: Signals,
    *,
    rank: int,
    adapted_roles: Sequence[str],
    max_rank: int,
    num_loss_tokens: int,
    loss: float,
    untrained_tokens: UntrainedTokens = UntrainedTokens(),
    early: bool = False,
) -> Rung | None:
    """Return the next rung by the signals; None if there is none within the bound.

    `adapted_roles` are the roles with an adapter now. Untrained tokens come first, as no layer makes up for
    them; then modules before rank: at equal parameters they gain far more wherever it was measured. If
    `early` in a run, the move goes at once to the rank that the data can fill.
    """
    if untrained_tokens.share >= MIN_UNTRAINED_SHARE:
        reason = (
            f"{untrained_tokens.share:.0%} of the tokens in the loss are one of {len(untrained_tokens.tokens)} "
            "whose rows in the head are untrained"
        )
        if len(untrained_tokens.tokens) > MAX_TOKEN_ROWS:
            return Rung("embeddings or head", (), rank, reason, also_train=("embeddings",))
        return Rung("embeddings or head", (), rank, reason, tokens=untrained_tokens.tokens)
    data_size = (num_loss_tokens, loss) if early else None
    if signals.unadapted > signals.residual:
        ranked = signals.by_worth()
        best = ranked[0][1]
        shares = signals.shares()
        new_roles = tuple(role for role, _ in ranked if shares[role] >= MIN_ROLE_SHARE)
        adapter_roles = {*adapted_roles, *new_roles}
        per_rank = sum(m.num_parameters_per_rank for m in signals.modules if m.role in adapter_roles)
        limit = max(rank, _rank_limit(signals, max_rank))
        min_rank = max(rank, min(limit, EARLY_RANK if data_size else USUAL_RANK))
        new_rank = rank_for(*data_size, per_rank, min_rank=min_rank, max_rank=limit) if data_size else min_rank
        worths = ", ".join(f"{role} {energy / best:.2f}" for role, energy in ranked)
        detail = f"lies in layers without an adapter (per parameter: {worths})"
        reason = f"{signals.share_unadapted:.0%} of the gradients' energy {detail}"
        return Rung("target modules", (*adapted_roles, *new_roles), new_rank, reason)
    limit = _rank_limit(signals, max_rank)
    if rank >= limit:
        return None
    per_rank = sum(m.num_parameters_per_rank for m in signals.modules if m.is_adapted)
    min_rank = min(limit, max(2 * rank, EARLY_RANK if data_size else USUAL_RANK))
    new_rank = rank_for(*data_size, per_rank, min_rank=min_rank, max_rank=limit) if data_size else min_rank
    inexpressible_share = signals.residual / (signals.residual + signals.tangent) if signals.residual > 0 else 0.0
    reason = f"{inexpressible_share:.0%} of the gradients' energy lies beyond what rank {rank} can express"
    return Rung("rank", (), new_rank, reason)


def _rank_limit(signals: Signals, max_rank: int) -> int:
    """Return the largest rank: within the bound, and below half of a full layer's."""
    narrowest = min(m.narrowest for m in signals.modules) if signals.modules else max_rank
    return min(max_rank, max(1, narrowest // 2))
