"""One real forward and backward before the first step, of the largest micro-batch that will come.

Does it fit, and is what is to be trained reached by the loss?

No optimizer step is made, and the random states are put back, so a run with it equals a run without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.attach import trainable_tensors, wrapped_storages
from peftkit.plan import Plan
from peftkit.train.batches import Drawn, batch_of
from peftkit.train.checkpoint.snapshot import random_states, restore_random_states

Loss = Callable[[Any, Mapping[str, Any], str], Any]
_SHOWN = 3
_PIECE = 2**20  # numbers of a tensor that are summed at once


@dataclass(frozen=True)
class Preflight:
    """What the pass found. `num_waiting` tensors get a gradient only once others have moved from zero."""

    loss: float
    num_tensors: int
    num_waiting: int
    num_frozen: int


def checksums(model: Any) -> dict[str, int]:
    """A checksum of every frozen tensor's bytes, in which every place weighs differently.

    Worked out in pieces where the tensor lies, so that it takes little memory beside it.
    """
    weights = torch.arange(1, _PIECE + 1, dtype=torch.int64)
    sums = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        flat = parameter.detach().contiguous().flatten().view(torch.uint8)
        whole = flat.numel() // 4 * 4
        total = int(flat[whole:].sum())
        for number, piece in enumerate(flat[:whole].view(torch.int32).split(_PIECE), start=1):
            weights = weights.to(piece.device)
            total += number * int((piece.to(torch.int64) * weights[: piece.numel()]).sum())
        sums[name] = total
    return sums


def _backward(model: Any, chosen: Sequence[Drawn], plan: Plan, *, pad_id: int, loss: Loss) -> float:
    """The loss that is trained, and its gradients."""
    made = batch_of(plan, chosen, pad_id)
    batch = {key: value.to(model.device) for key, value in made.items()}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.train.autocast or "")
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        value = loss(model, batch, plan.base.task)
    value.backward()
    return float(value.detach())


def _silent(model: Any) -> list[str]:
    """Trained tensors whose gradient is missing or all zero; rows of tokens may not occur in this batch."""
    return [
        name
        for name, tensor in trainable_tensors(model).items()
        if "trainable_tokens" not in name and (tensor.grad is None or not bool(tensor.grad.any()))
    ]


def wake(model: Any) -> dict[str, torch.Tensor]:
    """Move every trained tensor a little from where it starts, and return the starts.

    Half of an adapter starts at zero, and its other half gets no gradient until the first has moved.
    """
    generator = torch.Generator().manual_seed(0)
    kept = {}
    with torch.no_grad():
        for name, tensor in trainable_tensors(model).items():
            kept[name] = tensor.detach().clone()
            noise = torch.randn(tensor.shape, generator=generator) * 0.02
            tensor.add_(noise.to(tensor.device, tensor.dtype))
    return kept


def _refuse(where: str, names: Sequence[str], what: str, fix: str) -> Problem:
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return Problem(where, f"{what}: {shown}", "training that reaches everything it is to train", fix)


def preflight(model: Any, plan: Plan, largest: Sequence[Drawn], *, pad_id: int, loss: Loss) -> Preflight:
    """Run the pass on the largest micro-batch that will come, of rows or packs.

    Memory that is lacking shows here, not hours later.
    `loss` works out what is trained, for a model, a batch and a task. Raises UserError for what would train
    on nothing or change the base.
    """
    saved = random_states()
    frozen = checksums(model)
    was_training = model.training
    model.train()
    kept: dict[str, torch.Tensor] = {}
    try:
        value = _backward(model, largest, plan, pad_id=pad_id, loss=loss)
        silent = waiting = _silent(model)
        broken = [
            n
            for n, t in trainable_tensors(model).items()
            if t.grad is not None and not t.grad.isfinite().all()
        ]
        if silent:
            model.zero_grad(set_to_none=True)
            kept = wake(model)
            _backward(model, largest[-1:], plan, pad_id=pad_id, loss=loss)
            silent = [name for name in _silent(model) if name in silent]
    finally:
        with torch.no_grad():
            for name, tensor in trainable_tensors(model).items():
                if name in kept:
                    tensor.copy_(kept[name])
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        restore_random_states(*saved)
    changed = [name for name, value in checksums(model).items() if value != frozen[name]]
    problems = _problems(plan, loss=value, silent=silent, broken=broken, changed=changed)
    problems += _shared(model)
    if problems:
        raise UserError(problems)
    return Preflight(value, len(trainable_tensors(model)), len(waiting), len(frozen))


def _problems(
    plan: Plan, *, loss: float, silent: list[str], broken: list[str], changed: list[str]
) -> list[Problem]:
    found = []
    if not math.isfinite(loss):
        fix = "look at the rows, or use precision bf16 or fp32"
        found.append(Problem("train", f"a loss of {loss}", "a finite loss before the first step", fix))
    elif broken:
        found.append(_refuse("train.precision", broken, "gradients that are not finite", "use bf16 or fp32"))
    if silent:
        fix = "these layers are never called, or their weight is read past the adapter: leave them out"
        found.append(
            _refuse("method.targets", silent, f"{len(silent)} trained tensors without gradient", fix)
        )
    if changed:
        fix = "please report this family: its base must not change"
        found.append(_refuse("base", changed, "frozen tensors that a pass changed", fix))
    return found


def _shared(model: Any) -> list[Problem]:
    """Adapted modules that stand on one storage: merging would add every adapter to it."""
    fix = "target modules that are not shared between layers"
    return [
        _refuse("method.targets", names, "adapted modules that share one weight", fix)
        for names in wrapped_storages(model)
        if len(names) > 1
    ]
