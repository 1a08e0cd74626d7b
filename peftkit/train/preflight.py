"""Preflight: one real forward and backward before the first step, on the largest micro-batch to come.

It checks that memory suffices and that the loss reaches every trained tensor. No optimizer step is made, and
the random states are restored, so a run with it equals a run without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from peftkit.errors import Problem, UserError
from peftkit.evaluate.step import LossFunction, backward
from peftkit.model.adapter.attach import checkpointing_arguments, modules_by_storage, trainable_tensors
from peftkit.model.hardware import allocator_peak
from peftkit.model.meta.tensors import count_tensor_bytes
from peftkit.plan import Plan
from peftkit.train.batches import BatchRows, collate_groups
from peftkit.train.checkpoint.snapshot import random_states, restore_random_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_SHOWN = 3
_CHUNK_WORDS = 2**20  # numbers of a tensor that are summed at once


@dataclass(frozen=True)
class Preflight:
    """Result of the preflight. `num_waiting` tensors get a gradient only once others have moved from zero.

    `peak_bytes` is the most that torch's CPU allocator held, weights included; None on a GPU, whose allocator
    keeps count itself.
    """

    loss: float
    num_tensors: int
    num_waiting: int
    num_frozen: int
    peak_bytes: int | None


def frozen_checksums(model: PreTrainedModel) -> dict[str, int]:
    """Compute a checksum of every frozen tensor's bytes, weighted by position.

    With the bytes as int32 words w in chunks n = 1, 2, ... of _CHUNK_WORDS words, j = 1, 2, ... within a
    chunk: sum over n and j of n * j * w[n, j], plus the trailing bytes. Computed in chunks on the tensor's
    own device, so that it takes little extra memory.
    """
    weights = torch.arange(1, _CHUNK_WORDS + 1, dtype=torch.int64)
    sums = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        flat = parameter.detach().contiguous().flatten().view(torch.uint8)
        aligned_bytes = flat.numel() // 4 * 4
        total = int(flat[aligned_bytes:].sum())
        for number, piece in enumerate(flat[:aligned_bytes].view(torch.int32).split(_CHUNK_WORDS), start=1):
            weights = weights.to(piece.device)
            total += number * int((piece.to(torch.int64) * weights[: piece.numel()]).sum())
        sums[name] = total
    return sums


def _tensors_without_gradient(model: PreTrainedModel) -> list[str]:
    """Return trained tensors whose gradient is missing or zero; token rows may be absent from the batch."""
    return [
        name
        for name, tensor in trainable_tensors(model).items()
        if "trainable_tokens" not in name and (tensor.grad is None or not bool(tensor.grad.any()))
    ]


def perturb_zero_init(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Move every trained tensor slightly from its initial value, and return the initial values.

    Half of an adapter starts at zero, and its other half gets no gradient until the first has moved.
    """
    generator = torch.Generator().manual_seed(0)
    initial = {}
    with torch.no_grad():
        for name, tensor in trainable_tensors(model).items():
            initial[name] = tensor.detach().clone()
            noise = torch.randn(tensor.shape, generator=generator) * 0.02
            tensor.add_(noise.to(tensor.device, tensor.dtype))
    return initial


def _tensor_problem(where: str, names: Sequence[str], problem_text: str, fix: str) -> Problem:
    names_text = ", ".join(names[:_MAX_SHOWN]) + (
        f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    )
    return Problem(where, f"{problem_text}: {names_text}", "a gradient in every trained tensor and an intact base", fix)


def run_preflight(
    model: PreTrainedModel, plan: Plan, largest: Sequence[BatchRows], *, pad_id: int, loss: LossFunction
) -> Preflight:
    """Run forward and backward on the largest micro-batch that will come, of rows or packs.

    Missing memory shows here, not hours later. `loss` computes the training loss for a model, a batch and a
    task. Raises UserError for trained tensors without gradient, shared weights, or a base that changed.
    """

    def backward_groups(groups: Sequence[BatchRows]) -> float:
        batch = collate_groups(plan, groups, pad_id)
        return backward(model, batch, loss, task=plan.base.task, precision=plan.train.autocast)

    rng_states = random_states()
    frozen_sums = frozen_checksums(model)
    was_training = model.training
    model.train()
    recomputes = plan.train.gradient_checkpointing != "none"
    if recomputes:  # as the Trainer does once it trains: without, memory could be lacking here alone
        model.activation_checkpointing_enable(**checkpointing_arguments(plan))
    initial: dict[str, torch.Tensor] = {}
    try:
        on_cpu = model.device.type == "cpu"  # whose process also holds what glibc keeps of freed memory
        weight_bytes = count_tensor_bytes(model)
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if on_cpu else nullcontext()
        with profiler:
            value = backward_groups(largest)
        peak_bytes = weight_bytes + allocator_peak(profiler) if on_cpu else None
        if peak_bytes and plan.train.accumulation > 1:  # a later micro-batch finds the gradients of the first
            gradients = [t.grad for t in trainable_tensors(model).values() if t.grad is not None]
            peak_bytes += sum(gradient.untyped_storage().nbytes() for gradient in gradients)
        without_gradient = zero_start = _tensors_without_gradient(model)
        non_finite = [
            n for n, t in trainable_tensors(model).items() if t.grad is not None and not t.grad.isfinite().all()
        ]
        if without_gradient:
            model.zero_grad(set_to_none=True)
            initial = perturb_zero_init(model)
            backward_groups(largest[-1:])
            without_gradient = [name for name in _tensors_without_gradient(model) if name in without_gradient]
    finally:
        with torch.no_grad():
            for name, tensor in trainable_tensors(model).items():
                if name in initial:
                    tensor.copy_(initial[name])
        model.zero_grad(set_to_none=True)
        if recomputes:
            model.activation_checkpointing_disable()
        model.train(was_training)
        restore_random_states(*rng_states)
    changed_names = [name for name, value in frozen_checksums(model).items() if value != frozen_sums[name]]
    problems = []
    if not math.isfinite(value):
        fix = "inspect the rows, or use precision bf16 or fp32"
        problems.append(Problem("train", f"a loss of {value}", "a finite loss before the first step", fix))
    elif non_finite:
        problems.append(
            _tensor_problem("train.precision", non_finite, "gradients that are not finite", "use bf16 or fp32")
        )
    if without_gradient:
        fix = "these layers are never called, or bypass the adapter: remove them from the targets"
        problems.append(
            _tensor_problem(
                "method.targets", without_gradient, f"{len(without_gradient)} trained tensors without gradient", fix
            )
        )
    if changed_names:
        fix = "please report this family: its base must not change"
        problems.append(_tensor_problem("base", changed_names, "frozen tensors that a pass changed", fix))
    fix = "target modules that are not shared between layers"
    shared = [
        _tensor_problem("method.targets", names, "adapted modules that share one weight", fix)
        for names in modules_by_storage(model)
        if len(names) > 1
    ]
    problems += shared
    if problems:
        raise UserError(problems)
    return Preflight(value, len(trainable_tensors(model)), len(zero_start), len(frozen_sums), peak_bytes)
