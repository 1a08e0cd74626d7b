"""Several adapters as one change of a weight: summed, or by TIES or DARE, always on the changes themselves.

Adding up factors instead (A1 + A2)(B1 + B2) has cross terms that no adapter learnt. TIES: Yadav et al. 2023,
section 4.2. DARE: Yu et al. 2024, equation 2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch

from peftkit.errors import Problem, UserError
from peftkit.model.edits import Edit
from peftkit.model.layout import Place
from peftkit.ship.deltas import Read, added, changed

Combining = Literal["sum", "ties", "dare"]


@dataclass(frozen=True)
class Combination:
    """How changes become one. `density` is the share of a change's numbers that TIES and DARE keep."""

    weights: tuple[float, ...] = (1.0,)
    how: Combining = "sum"
    density: float = 0.5
    seed: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it is one adapter as it is."""
        return self.weights == (1.0,) and self.how == "sum"


def combination(
    weights: Sequence[float] | None, num: int, *, how: str, density: float, seed: int
) -> Combination:
    """What the user asks for. Raises UserError, all at once, for what is no combination."""
    problems = []
    given = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * num
    if len(given) != num:
        problems.append(Problem("weights", f"{len(given)} for {num} adapters", "one for each"))
    if not all(math.isfinite(weight) and weight != 0 for weight in given):
        problems.append(Problem("weights", ", ".join(f"{w:g}" for w in given), "finite numbers, none zero"))
    if how not in get_args(Combining):
        problems.append(Problem("--combine", how, ", ".join(get_args(Combining))))
    if not 0 < density <= 1:
        problems.append(Problem("--density", f"{density:g}", "above 0, at most 1"))
    if problems:
        raise UserError(problems)
    return Combination(given, cast(Combining, how), density, seed)


def combined(
    weight: torch.Tensor,
    edits: Sequence[tuple[Edit, ...]],
    reads: Sequence[Read],
    how: Combination,
    *,
    place: Place,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight plus all adapters' changes of it, summed in fp32 and rounded once."""
    changes = [
        (change(weight, own, read, place=place), share, number)
        for number, (own, read, share) in enumerate(zip(edits, reads, how.weights, strict=True))
        if own
    ]
    if not changes:
        return weight.to(dtype)
    return (weight.float() + _one(changes, how, place)).to(dtype)


def change(weight: torch.Tensor, edits: Sequence[Edit], read: Read, *, place: Place) -> torch.Tensor:
    """What an adapter's edits change in a weight, in fp32."""
    if len(edits) == 1 and edits[0].adds:
        return added(edits[0], read, place=place, shape=weight.shape)
    return changed(weight, edits, read, place=place) - weight.float()


def _one(changes: Sequence[tuple[torch.Tensor, float, int]], how: Combination, place: Place) -> torch.Tensor:
    if how.how == "ties":
        return ties([_largest(delta, how.density) * share for delta, share, _ in changes])
    if how.how == "dare":
        return sum_of(
            [dare(delta, how, _seed(how, place, number)) * share for delta, share, number in changes]
        )
    return sum_of([delta * share for delta, share, _ in changes])


def sum_of(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, in the order given."""
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    return total


def _largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Only the largest numbers, the others zero."""
    kept = max(1, round(density * delta.numel()))
    if kept >= delta.numel():
        return delta
    threshold = delta.abs().reshape(-1).kthvalue(delta.numel() - kept + 1).values
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def ties(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """At each place the sign with the larger total, and the sum of what has it over how many have it.

    Shares of adapters that are not one another's equal count as they are: with weights w the result is the
    mean of w times the change, so that a single adapter comes back as it is.
    """
    stacked = torch.stack(list(deltas))
    sign = torch.sign(stacked.sum(0))
    agree = (torch.sign(stacked) == sign) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(delta: torch.Tensor, how: Combination, seed: int) -> torch.Tensor:
    """Each number dropped with probability 1 - density, the others divided by the density."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=generator) < how.density
    return torch.where(kept, delta / how.density, 0.0)


def _seed(how: Combination, place: Place, number: int) -> int:
    """The same for a weight whatever else is merged, and whichever file it stands in."""
    text = f"{how.seed} {number} {place.parameter} {place.expert} {place.part}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
