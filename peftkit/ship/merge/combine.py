"""Combination of several adapters' changes of a weight: weighted sum, TIES or DARE.

Always on the changes themselves: adding up factors, (A1 + A2)(B1 + B2), has cross terms that no adapter
trained. TIES: Yadav et al. 2023, section 4.2. DARE: Yu et al. 2024, equation 2.
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
from peftkit.model.meta.layout import Placement
from peftkit.ship.merge.deltas import TensorReader, apply_edits, edit_delta

_SLICE_ROWS = 256
CombineMethod = Literal["sum", "ties", "dare"]


@dataclass(frozen=True)
class Combination:
    """Rule that combines changes. `density` is the share of a change's numbers that TIES and DARE keep."""

    weights: tuple[float, ...] = (1.0,)
    how: CombineMethod = "sum"
    density: float = 0.5
    seed: int = 0

    @property
    def is_plain(self) -> bool:
        """Return whether it is one adapter with weight 1."""
        return self.weights == (1.0,) and self.how == "sum"


def make_combination(
    weights: Sequence[float] | None, num_adapters: int, *, how: str, density: float, seed: int
) -> Combination:
    """Build the combination that the options ask for. Raises UserError with all invalid values at once."""
    problems = []
    adapter_weights = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * num_adapters
    if len(adapter_weights) != num_adapters:
        problems.append(Problem("weights", f"{len(adapter_weights)} for {num_adapters} adapters", "one for each"))
    if not all(math.isfinite(weight) and weight != 0 for weight in adapter_weights):
        problems.append(Problem("weights", ", ".join(f"{w:g}" for w in adapter_weights), "finite numbers, none zero"))
    if how not in get_args(CombineMethod):
        problems.append(Problem("--combine", how, ", ".join(get_args(CombineMethod))))
    if not 0 < density <= 1:
        problems.append(Problem("--density", f"{density:g}", "above 0, at most 1"))
    if problems:
        raise UserError(problems)
    return Combination(adapter_weights, cast(CombineMethod, how), density, seed)


def merge_combined(
    weight: torch.Tensor,
    edits: Sequence[tuple[Edit, ...]],
    reads: Sequence[TensorReader],
    combination: Combination,
    *,
    place: Placement,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the weight plus all adapters' combined changes, summed in fp32 and rounded once."""
    active = [
        (adapter_edits, read, w)
        for adapter_edits, read, w in zip(edits, reads, combination.weights, strict=True)
        if adapter_edits
    ]
    if not active:
        return weight.to(dtype)
    indices = [index for index, adapter_edits in enumerate(edits) if adapter_edits]
    if combination.how == "ties":
        trimmed = (
            _trim_smallest(adapter_delta(weight, adapter_edits, read, place=place), combination.density)
            for adapter_edits, read, _ in active
        )
        total = ties([delta.mul_(w) for delta, (_, _, w) in zip(trimmed, active, strict=True)])
    else:
        total = torch.zeros(weight.shape)
        for index, (adapter_edits, read, adapter_weight) in zip(indices, active, strict=True):
            delta = adapter_delta(weight, adapter_edits, read, place=place)
            if combination.how == "dare":
                # the same for a weight whatever else is merged, and whichever file holds it
                text = f"{combination.seed} {index} {place.parameter} {place.expert} {place.part}"
                weight_seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
                delta = dare(delta, combination, weight_seed)
            total.add_(delta, alpha=adapter_weight)
    return total.add_(weight).to(dtype)


def adapter_delta(weight: torch.Tensor, edits: Sequence[Edit], read: TensorReader, *, place: Placement) -> torch.Tensor:
    """Return what an adapter's edits change in a weight, in fp32."""
    if len(edits) == 1 and edits[0].is_additive:
        return edit_delta(edits[0], read, place=place, shape=weight.shape)
    return apply_edits(weight, edits, read, place=place) - weight.float()


def _trim_smallest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Zero all but the largest `density` of a change's numbers, in place (the trim step of TIES).

    Per weight, not over all weights together.
    """
    num_kept = max(1, round(density * delta.numel()))
    if num_kept < delta.numel():
        threshold = delta.abs().reshape(-1).kthvalue(delta.numel() - num_kept + 1).values
        delta.masked_fill_(delta.abs() < threshold, 0.0)
    return delta


def ties(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Merge changes by elected sign (TIES): at each position the mean of those that have the sign of the sum.

    s = sign(sum_i d_i), result = sum_i d_i [sign(d_i) = s] / #{i: sign(d_i) = s}, and 0 where none has it.

    deltas  [0.4, -0.2], [0.2, 0.3], [-0.1, 0.0]
    s       [+, +]
    result  [(0.4 + 0.2) / 2, 0.3] = [0.3, 0.3]

    Each change counts as one in the mean, whatever its weight w: the result is the mean of w d, so that a
    single adapter comes back as it is. Overwrites the first.
    """
    for rows in zip(*(torch.split(delta, _SLICE_ROWS) for delta in deltas), strict=True):
        stacked = torch.stack(list(rows))
        agrees = (torch.sign(stacked) == torch.sign(stacked.sum(0))) & (stacked != 0)
        rows[0].copy_((stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1))
    return deltas[0]


def dare(delta: torch.Tensor, combination: Combination, seed: int) -> torch.Tensor:
    """Drop each number with probability 1 - density and divide the others by the density (DARE)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(delta.shape, generator=generator) < combination.density
    return torch.where(mask, delta / combination.density, 0.0)
