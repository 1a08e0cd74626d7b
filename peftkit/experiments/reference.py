"""The reference: short full training of the adapted weights, against the adapter at the same steps.

Full fine-tuning of all weights would be the wrong yardstick: no adapter on linear layers can do what
embeddings and norms do. Both are tried at several learning rates, as a comparison at one says nothing of
capacity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from peftkit.diagnose.statistics import HeldOutLosses, Interval, paired_gain
from peftkit.experiments.forks import ForkStart, draw_fork_batches, train_fork, with_learning_rate
from peftkit.model.adapter.attach import trainable_tensors
from peftkit.plan.rate import EVAL_COST
from peftkit.prepare.context import RunContext
from peftkit.train.checkpoint.restore import load_trained
from peftkit.train.trainer import training_loss
from peftkit.train.training import compute_row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS_SHARE = 0.1  # of the run's steps, each
_MIN_STEPS = 20
FULL_RATE_FACTORS = (0.03, 0.1, 0.3)  # of the adapter's: full fine-tuning wants about a tenth (Schulman et al. 2025)
ADAPTER_RATE_FACTORS = (1.0, 3.0)


def gap_to_full_finetuning(
    context: RunContext, model: PreTrainedModel, held_out: HeldOutLosses, rows: list[Any], *, pad_id: int
) -> tuple[Interval, float]:
    """Return how much better full training of the same weights is, and the tokens that this took.

    The gain is an interval in nats per token, the best full fork against the best adapter fork. `model` is
    the wrapped one; its adapter is reset and left so, its base is restored. `held_out` gives the documents of
    the held-out `rows`.
    """
    plan, train = context.plan, context.prepared.train
    num_steps = max(_MIN_STEPS, round(STEPS_SHARE * (plan.train.num_steps or 0)))
    steps = draw_fork_batches(plan, train, num_steps, batch_size=plan.train.batch_size, seed=0)
    tokens, results = 0.0, dict[str, list[HeldOutLosses]]()

    initial_state = ForkStart(
        {
            name: torch.zeros_like(tensor) if ".lora_B." in name else tensor.detach().clone()
            for name, tensor in trainable_tensors(model).items()
        },
        {},
    )
    for kind, rates in (("adapter", ADAPTER_RATE_FACTORS), ("full", FULL_RATE_FACTORS)):
        with _trainable_weights(model, kind, initial_state) as start:
            for rate in rates:
                scaled_plan = with_learning_rate(plan, plan.train.learning_rate * rate)
                result = train_fork(model, scaled_plan, start, steps, pad_id=pad_id, loss=training_loss(plan))
                tokens += result.num_tokens + EVAL_COST * sum(row.length for row in rows)
                if result.is_finite:
                    losses = compute_row_losses(model, rows, plan, pad_id=pad_id)
                    row_losses = HeldOutLosses(losses.sums, losses.counts, held_out.documents)
                    results.setdefault(kind, []).append(row_losses)
    best = {kind: min(candidates, key=lambda one: one.mean) for kind, candidates in results.items()}
    if len(best) < 2:
        no_evidence = Interval(0.0, float("-inf"), float("inf"), len(set(held_out.documents)))
        return no_evidence, tokens
    return paired_gain(best["adapter"], best["full"]), tokens


@contextmanager
def _trainable_weights(model: PreTrainedModel, kind: str, initial_state: ForkStart) -> Iterator[ForkStart]:
    """Make the adapter trainable, or the base weights behind it; restore the base weights afterwards."""
    load_trained(model, initial_state.trained)
    if kind == "adapter":
        yield initial_state
        return
    adapter = list(trainable_tensors(model).values())
    weights = [
        module.base_layer.weight
        for module in model.modules()
        if hasattr(module, "lora_A") and hasattr(getattr(module, "base_layer", None), "weight")
    ]
    for tensor in adapter:
        tensor.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    original_weights = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.to(torch.float32, copy=True)  # small updates vanish in 16 bits
    start = ForkStart({name: t.detach().clone() for name, t in trainable_tensors(model).items()}, {})
    try:
        yield start
    finally:
        for weight, data in zip(weights, original_weights, strict=True):
            weight.requires_grad_(False)
            weight.data = data
        for tensor in adapter:
            tensor.requires_grad_(True)
