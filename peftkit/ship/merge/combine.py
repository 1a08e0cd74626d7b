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
from peftkit.model.adapter.edits import Edit
from peftkit.model.meta.layout import Place
from peftkit.ship.merge.deltas import Read, added, changed

_SLICE_ROWS = 256
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
    held = [(own, read, w) for own, read, w in zip(edits, reads, how.weights, strict=True) if own]
    if not held:
        return weight.to(dtype)
    numbers = [number for number, own in enumerate(edits) if own]
    if how.how == "ties":
        trimmed = (_largest(change(weight, own, read, place=place), how.density) for own, read, _ in held)
        total = ties([delta.mul_(w) for delta, (_, _, w) in zip(trimmed, held, strict=True)])
    else:
        total = torch.zeros(weight.shape)
        for number, (own, read, share) in zip(numbers, held, strict=True):
            delta = change(weight, own, read, place=place)
            if how.how == "dare":
                delta = dare(delta, how, _seed(how, place, number))
            total.add_(delta, alpha=share)
    return total.add_(weight).to(dtype)


def change(weight: torch.Tensor, edits: Sequence[Edit], read: Read, *, place: Place) -> torch.Tensor:
    """What an adapter's edits change in a weight, in fp32."""
    if len(edits) == 1 and edits[0].adds:
        return added(edits[0], read, place=place, shape=weight.shape)
    return changed(weight, edits, read, place=place) - weight.float()


def _largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Only the largest numbers, the others zero, in place. Of each weight by itself, not of all together."""
    kept = max(1, round(density * delta.numel()))
    if kept < delta.numel():
        threshold = delta.abs().reshape(-1).kthvalue(delta.numel() - kept + 1).values
        delta.masked_fill_(delta.abs() < threshold, 0.0)
    return delta


def ties(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """At each place the sign with the larger total, and the sum of what has it over how many have it.

    Shares of adapters that are not one another's equal count as they are: with weights w the result is the
    mean of w times the change, so that a single adapter comes back as it is. The first is written over.
    """
    for rows in zip(*(torch.split(delta, _SLICE_ROWS) for delta in deltas), strict=True):
        stacked = torch.stack(list(rows))
        agree = (torch.sign(stacked) == torch.sign(stacked.sum(0))) & (stacked != 0)
        rows[0].copy_((stacked * agree).sum(0) / agree.sum(0).clamp(min=1))
    return deltas[0]


def dare(delta: torch.Tensor, how: Combination, seed: int) -> torch.Tensor:
    """Each number dropped with probability 1 - density, the others divided by the density."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=generator) < how.density
    return torch.where(kept, delta / how.density, 0.0)


def _seed(how: Combination, place: Place, number: int) -> int:
    """The same for a weight whatever else is merged, and whichever file it stands in."""
    text = f"{how.seed} {number} {place.parameter} {place.expert} {place.part}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
