"""The reference: short trainings of the adapted weights themselves, against the adapter's at the same steps.

Full fine-tuning of everything would be the wrong yardstick: what embeddings and norms bring, no adapter on
linear layers can. Both get rates of their own, as a comparison without says nothing of capacity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peftkit.diagnose.statistics import Interval, Rows, gain
from peftkit.experiments.forks import Start, at_rate, draw, fork
from peftkit.model.adapter.attach import trainable_tensors
from peftkit.prepare.context import Stage
from peftkit.train.training import losses_of, objective

SHARE = 0.1  # of the run's steps, each
_FEWEST_STEPS = 20
FULL_RATES = (0.03, 0.1, 0.3)  # of the adapter's: full fine-tuning wants about a tenth (Schulman et al. 2025)
ADAPTER_RATES = (1.0, 3.0)
_EVAL_COST = 1 / 3


def behind(stage: Stage, model: Any, held: Rows, rows: list[Any], *, pad_id: int) -> tuple[Interval, float]:
    """(how much better full training of the same weights is, the tokens that this took).

    `model` is the wrapped one; its adapter is begun anew and left so, its base is put back. `held` gives the
    documents of the held-out `rows`.
    """
    plan, train = stage.plan, stage.prepared.train
    num_steps = max(_FEWEST_STEPS, round(SHARE * (plan.train.num_steps or 0)))
    steps = draw(plan, train, num_steps, batch_size=plan.train.batch_size, seed=0)
    tokens, found = 0.0, dict[str, list[Rows]]()
    begun = _begun(model)
    for kind, rates in (("adapter", ADAPTER_RATES), ("full", FULL_RATES)):
        with _trained(model, kind, begun) as start:
            for rate in rates:
                own = at_rate(plan, plan.train.learning_rate * rate)
                forked = fork(model, own, start, steps, pad_id=pad_id, loss=objective(plan).loss)
                tokens += forked.num_tokens + _EVAL_COST * sum(row.length for row in rows)
                if forked.is_finite:
                    losses = losses_of(model, rows, plan, pad_id=pad_id)
                    made = Rows(losses.sums, losses.counts, held.documents)
                    found.setdefault(kind, []).append(made)
    best = {kind: min(each, key=lambda one: one.mean) for kind, each in found.items()}
    if len(best) < 2:
        nothing = Interval(0.0, float("-inf"), float("inf"), len(set(held.documents)))
        return nothing, tokens
    return gain(best["adapter"], best["full"]), tokens


def _begun(model: Any) -> Start:
    """The adapter at its beginning: B zero, A as the run's now, which spans as much as a new one."""
    import torch

    return Start(
        {
            name: torch.zeros_like(tensor) if ".lora_B." in name else tensor.detach().clone()
            for name, tensor in trainable_tensors(model).items()
        },
        {},
    )


@contextmanager
def _trained(model: Any, kind: str, begun: Start) -> Iterator[Start]:
    """The model with the adapter trained, or with the weights behind it in the adapter's place."""
    import torch

    from peftkit.train.checkpoint.restore import load_trained

    load_trained(model, begun.trained)
    if kind == "adapter":
        yield begun
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
    kept = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.to(torch.float32, copy=True)  # small updates vanish in 16 bits
    start = Start({name: t.detach().clone() for name, t in trainable_tensors(model).items()}, {})
    try:
        yield start
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.requires_grad_(False)
            weight.data = data
        for tensor in adapter:
            tensor.requires_grad_(True)
