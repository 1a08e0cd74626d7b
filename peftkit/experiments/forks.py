"""Forks: short continuations of a training from one state, on the same batches, compared on held-out rows.

Those from within a run are judged by the mean of their weights over the second half: the mean stands for a learning
rate decayed to zero and costs no steps (Izmailov et al. 2018), so a larger rate is not judged by the noise it makes
meanwhile. Those from the start of a run are decayed: a small training each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from peftkit import interrupt
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.evaluate.step import LossFunction, backward
from peftkit.model.adapter.attach import build_loraplus_optimizer, trainable_tensors
from peftkit.plan import Plan
from peftkit.plan.schedule import SCHEDULE_FREE
from peftkit.rundir import read_json
from peftkit.train.batches import BatchRows, collate_groups, row_groups
from peftkit.train.checkpoint.restore import load_trained
from peftkit.train.checkpoint.snapshot import Tensors, load_tensors, random_states, restore_random_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ForkStep = Sequence[Sequence[BatchRows]]  # micro-batches
_DECAYED_WARMUP_SHARE = 0.15
_WARMUP_SHARE = 0.2  # of a fork's steps: moments of another rate, or none, are not trusted at once


@dataclass(frozen=True)
class ForkStart:
    """The start of a fork: trained tensors, and the optimizer's state by "name|field" where it is kept."""

    trained: Tensors
    optimizer: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: Path) -> ForkStart:
        """Load a checkpoint's tensors as copies: its files may be rotated away."""
        trained, tensors = (
            {name: tensor.clone() for name, tensor in load_tensors(checkpoint, stem).items()}
            for stem in ("trained", "optimizer")
        )
        return cls(trained, {**read_json(checkpoint / "state.json")["optimizer"], **tensors})


@dataclass(frozen=True)
class ForkResult:
    """The outcome of training a fork: its mean loss, the tokens it used, and if its loss stayed finite."""

    train_loss: float
    num_tokens: int
    is_finite: bool


def draw_fork_batches(
    plan: Plan, rows: Sequence[Tokenized], num_steps: int, *, batch_size: int, seed: int
) -> list[ForkStep]:
    """Draw the batches of a fork: steps of `batch_size` rows or packs, without replacement while they last.

    Each step is split into micro-batches of the plan's size.
    """
    rng, groups = np.random.default_rng([plan.seed, seed]), row_groups(plan, rows)
    num_groups = num_steps * batch_size
    order = np.concatenate([rng.permutation(len(groups)) for _ in range(-(-num_groups // len(groups)))])
    sampled_groups = [[rows[number] for number in groups[i]] for i in order[:num_groups]]
    size = min(plan.train.micro_batch, batch_size)
    steps = [sampled_groups[i : i + batch_size] for i in range(0, num_groups, batch_size)]
    return [[step[i : i + size] for i in range(0, batch_size, size)] for step in steps]


def decayed_rate_factor(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at `step`, from 0: a warm-up of 15 %, then a cosine to zero."""
    num_warmup = max(1, round(_DECAYED_WARMUP_SHARE * num_steps))
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


def fork_rate_factor(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at `step`, from 0: min(1, (step + 1) / (w + 1)).

    w is 20 % of the fork's steps, at least 1: moments of another rate, or none, are not trusted at once.
    """
    num_warmup = max(1, round(_WARMUP_SHARE * num_steps))
    return min(1.0, (step + 1) / (num_warmup + 1))


def train_fork(
    model: PreTrainedModel,
    plan: Plan,
    start: ForkStart,
    steps: Sequence[ForkStep],
    *,
    pad_id: int,
    loss: LossFunction,
    decayed: bool = False,
) -> ForkResult:
    """Train from `start` over `steps` at the plan's rate; the model then holds its mean over the second half.

    Where it is `decayed`, the rate falls to zero within the fork, and the model holds its last weights.

    Random states are restored. Raises Interrupted on a signal.
    """
    rng_states, was_training = random_states(), model.training
    load_trained(model, start.trained)
    optimizer = _fork_optimizer(model, plan, start)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    torch.manual_seed(plan.seed)  # the same dropout in each fork
    model.train()
    losses, num_tokens, mean = [], 0, _RunningMean()
    try:
        for number, step in enumerate(steps):
            interrupt.stop_if_requested("interrupted during the diagnosis")
            rate_factor = (decayed_rate_factor if decayed else fork_rate_factor)(number, len(steps))
            for group, peak_rate in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = rate_factor * peak_rate
            # gradients of the mean over the step's loss tokens, as in training
            batches = [collate_groups(plan, micro_batch, pad_id) for micro_batch in step]
            counts = [count_loss_tokens(batch["labels"], plan.base.task) for batch in batches]
            value = 0.0
            for batch, count in zip(batches, counts, strict=True):
                weight = count / max(1, sum(counts))
                value += backward(model, batch, loss, task=plan.base.task, precision=plan.train.autocast, weight=weight)
            num_tokens += sum(row.length for groups in step for group in groups for row in group)
            norm = torch.nn.utils.clip_grad_norm_(trainable_tensors(model).values(), plan.train.max_grad_norm)
            losses.append(value)
            if not (np.isfinite(value) and bool(norm.isfinite())):
                return ForkResult(value, num_tokens, is_finite=False)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            if not decayed and number >= len(steps) // 2:
                mean.add(trainable_tensors(model))
        if not decayed:
            load_trained(model, mean.tensors())
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        restore_random_states(*rng_states)
    return ForkResult(float(np.mean(losses)), num_tokens, is_finite=True)


class _RunningMean:
    """A running mean of tensors by name, in fp32."""

    def __init__(self) -> None:
        self.sums: Tensors = {}
        self.num = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            piece = tensor.detach().float()
            self.sums[name] = self.sums[name] + piece if self.num else piece.clone()
        self.num += 1

    def tensors(self) -> Tensors:
        return {name: total / self.num for name, total in self.sums.items()}


def count_loss_tokens(labels: torch.Tensor, task: str) -> int:
    """Count the labels in the loss: a decoder's first token is predicted by nothing."""
    targets = labels[:, 1:] if task == "causal-lm" else labels
    return int((targets != IGNORE_INDEX).sum())


def _fork_optimizer(model: PreTrainedModel, plan: Plan, start: ForkStart) -> torch.optim.Optimizer:
    """Build the plan's optimizer with the start's state, where that was kept for these tensors.

    Plain AdamW, without a state, for a schedule-free one: its mean says nothing within so few steps.
    """
    is_schedule_free = plan.train.optimizer == SCHEDULE_FREE
    if plan.method.lr_ratio is not None:
        optimizer = build_loraplus_optimizer(model, plan)
    else:
        training_arguments = TrainingArguments(
            optim="adamw_torch" if is_schedule_free else plan.train.optimizer,
            learning_rate=plan.train.learning_rate,
            use_cpu=plan.device == "cpu",
            report_to="none",
        )
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training_arguments)
        tensors = trainable_tensors(model).values()
        matrices, vectors = [p for p in tensors if p.ndim > 1], [p for p in tensors if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": plan.train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = optimizer_class([group for group in groups if group["params"]], **options)
    parameters = trainable_tensors(model)
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for key, value in ({} if is_schedule_free else start.optimizer).items():
        name, field = key.rsplit("|", 1)
        if name in parameters:
            parameter = parameters[name]
            if not torch.is_tensor(value):
                optimizer.state[parameters[name]][field] = value
            else:
                optimizer.state[parameters[name]][field] = value.to(
                    "cpu" if value.ndim == 0 and not on_device else parameter.device, copy=True
                )
    return optimizer


def with_learning_rate(plan: Plan, rate: float) -> Plan:
    """Return the plan with another learning rate."""
    return replace(plan, train=replace(plan.train, learning_rate=rate))
