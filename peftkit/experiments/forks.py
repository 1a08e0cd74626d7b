"""Forks: short continuations of a training from one state, on the same batches, compared on held-out rows.

Each is judged by the mean of its weights over its second half, which stands for a rate that decays to nothing
and costs no steps (Izmailov et al. 2018): a larger rate is not judged by the noise that it makes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from peftkit import interrupt
from peftkit.data.tokens.mask import IGNORED, Tokenized
from peftkit.model.adapter.attach import build_loraplus_optimizer, trainable_tensors
from peftkit.plan import Plan
from peftkit.rundir import read_json
from peftkit.train.batches import Drawn, batch_of, drawn_from
from peftkit.train.checkpoint.restore import load_trained
from peftkit.train.checkpoint.snapshot import Tensors, load_tensors, random_states, restore_random_states

Step = Sequence[Sequence[Drawn]]  # micro-batches
Loss = Callable[[Any, Any, str], Any]
_WARM = 0.2  # of a fork's steps: moments of another rate, or none, are not trusted at once


@dataclass(frozen=True)
class Start:
    """Where a fork begins: trained tensors, and the optimizer's state by "name|field" where it is kept."""

    trained: Tensors
    optimizer: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: Path) -> Start:
        """A checkpoint's tensors, copied: its files may be rotated away."""
        trained, tensors = (
            {name: tensor.clone() for name, tensor in load_tensors(checkpoint, stem).items()}
            for stem in ("trained", "optimizer")
        )
        return cls(trained, {**read_json(checkpoint / "state.json")["optimizer"], **tensors})


@dataclass(frozen=True)
class Forked:
    """How a fork's training went: its mean loss, and the tokens that it saw."""

    train_loss: float
    num_tokens: int
    is_finite: bool


def draw(plan: Plan, rows: Sequence[Tokenized], num_steps: int, *, batch_size: int, seed: int) -> list[Step]:
    """The batches of a fork: steps of `batch_size` rows or packs, drawn without return while they last."""
    chance, found = np.random.default_rng([plan.seed, seed]), drawn_from(plan, rows)
    wanted = num_steps * batch_size
    order = np.concatenate([chance.permutation(len(found)) for _ in range(-(-wanted // len(found)))])
    chosen = [[rows[number] for number in found[i]] for i in order[:wanted]]
    size = min(plan.train.micro_batch, batch_size)
    steps = [chosen[i : i + batch_size] for i in range(0, wanted, batch_size)]
    return [[step[i : i + size] for i in range(0, batch_size, size)] for step in steps]


def rate_at(step: int, num_steps: int) -> float:
    """The share of the peak rate at a step from 0: up over the first few."""
    warm = max(1, round(_WARM * num_steps))
    return min(1.0, (step + 1) / (warm + 1))


def fork(model: Any, plan: Plan, start: Start, steps: Sequence[Step], *, pad_id: int, loss: Loss) -> Forked:
    """Train from `start` over `steps` at the plan's rate; the model then holds its mean over the second half.

    Random states are put back. Raises Interrupted on a signal.
    """
    saved, was_training = random_states(), model.training
    load_trained(model, start.trained)
    optimizer = _optimizer(model, plan, start)
    peaks = [group["lr"] for group in optimizer.param_groups]
    torch.manual_seed(plan.seed)  # the same dropout in each fork
    model.train()
    losses, num_tokens, mean = [], 0, _Mean()
    try:
        for number, step in enumerate(steps):
            interrupt.stop_if_requested("interrupted while looking for a cause")
            share = rate_at(number, len(steps))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = share * peak
            value, tokens = _backward(model, plan, step, pad_id=pad_id, loss=loss)
            num_tokens += tokens
            norm = torch.nn.utils.clip_grad_norm_(trainable_tensors(model).values(), plan.train.max_grad_norm)
            losses.append(value)
            if not (np.isfinite(value) and bool(norm.isfinite())):
                return Forked(value, num_tokens, is_finite=False)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            if number >= len(steps) // 2:
                mean.add(trainable_tensors(model))
        load_trained(model, mean.tensors())
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        restore_random_states(*saved)
    return Forked(float(np.mean(losses)), num_tokens, is_finite=True)


class _Mean:
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


def _backward(model: Any, plan: Plan, step: Step, *, pad_id: int, loss: Loss) -> tuple[float, int]:
    """Gradients of the mean over all that a step learns; (that mean, tokens seen)."""
    batches = [batch_of(plan, chosen, pad_id) for chosen in step]
    counts = [num_learnt(batch["labels"], plan.base.task) for batch in batches]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.train.autocast or "")
    total = 0.0
    for made, count in zip(batches, counts, strict=True):
        batch = {key: value.to(model.device) for key, value in made.items()}
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
            value = loss(model, batch, plan.base.task) * (count / max(1, sum(counts)))
        value.backward()
        total += float(value.detach())
    return total, sum(row.length for one in step for drawn in one for row in drawn)


def num_learnt(labels: torch.Tensor, task: str) -> int:
    """How many labels the loss sees: a decoder's first token is predicted by nothing."""
    seen = labels[:, 1:] if task == "causal-lm" else labels
    return int((seen != IGNORED).sum())


def _optimizer(model: Any, plan: Plan, start: Start) -> Any:
    """The plan's optimizer with the state of the start, where that was kept for these tensors."""
    if plan.method.lr_ratio is not None:
        made = build_loraplus_optimizer(model, plan)
    else:
        arguments = TrainingArguments(
            optim=plan.train.optimizer,
            learning_rate=plan.train.learning_rate,
            use_cpu=plan.device == "cpu",
            report_to="none",
        )
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        named = trainable_tensors(model).values()
        matrices, vectors = [p for p in named if p.ndim > 1], [p for p in named if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": plan.train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        made = kind([group for group in groups if group["params"]], **options)
    live = trainable_tensors(model)
    on_device = any(group.get("fused") or group.get("capturable") for group in made.param_groups)
    for key, value in start.optimizer.items():
        name, field = key.rsplit("|", 1)
        if name in live:
            made.state[live[name]][field] = _beside(value, live[name], on_device=on_device)
    return made


def _beside(value: Any, parameter: torch.Tensor, *, on_device: bool) -> Any:
    """A copy of a field of an optimizer's state where the optimizer wants it; plain values as they are."""
    if not torch.is_tensor(value):
        return value
    return value.to("cpu" if value.ndim == 0 and not on_device else parameter.device, copy=True)


def at_rate(plan: Plan, rate: float) -> Plan:
    """The plan with another learning rate."""
    return replace(plan, train=replace(plan.train, learning_rate=rate))
