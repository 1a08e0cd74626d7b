"""One micro-batch through a model: autocast, loss and backward, for all but the Trainer and the memory trace.

The Trainer has its own loop, and `model.meta.trace` follows it on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from peftkit.data.tokens.mask import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LossFunction = Callable[[Any, Mapping[str, Any], str], Any]  # model, batch, task -> a scalar tensor


def autocast(model: PreTrainedModel, precision: str | None) -> torch.autocast:
    """Return the autocast context of a plan's precision ("bf16", "fp16" or None) on the model's device."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or "")
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)


def to_device(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the batch's tensors on the model's device."""
    return {key: value.to(model.device) for key, value in batch.items()}


def backward(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    loss: LossFunction,
    *,
    task: str,
    precision: str | None,
    weight: float | None = None,
) -> float:
    """Run forward and backward of a micro-batch; return its loss, times `weight` where given.

    Gradients are accumulated in the model.
    """
    tensors = to_device(model, batch)
    with autocast(model, precision):
        value = loss(model, tensors, task)
        if weight is not None:
            value = value * weight
    value.backward()
    return float(value.detach())


def forward_inputs(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], task: str) -> dict[str, Any]:
    """Return a batch's forward arguments: no labels, but for seq2seq the shifted decoder input ids."""
    inputs = {key: value for key, value in batch.items() if key not in {"labels", "weights", "rows"}}
    if task == "seq2seq":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(batch["labels"])
    return inputs


def summed_loss(logits: Any, labels: Any, task: str, weights: Any = None, smoothing: float = 0.0) -> torch.Tensor:
    """Compute the cross entropy in nats, summed over the labels in the loss, times their weights if given.

    `smoothing` is the share of each target that is spread over all classes (Szegedy et al. 2016, section 7).

    Logits have shape (rows, positions, vocabulary), or (rows, classes); of multi-label each class is a question
    of its own, as transformers' `multi_label_classification`. Those of a causal LM predict the next token; virtual
    tokens may precede them.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    if task == "multi-label":
        in_loss = labels.ne(IGNORE_INDEX) if weights is None else labels.ne(IGNORE_INDEX) * weights
        return binary_cross_entropy_with_logits(logits.float(), labels.clamp(min=0).float(), in_loss, reduction="sum")
    if task == "causal-lm":
        logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
        weights = None if weights is None else weights[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    if weights is None:
        return cross_entropy(
            flat, labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
        )
    label_losses = cross_entropy(
        flat, labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
    )
    return (label_losses * weights.reshape(-1)).sum()


def loss_from_logits(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], task: str, *, smoothing: float = 0.0
) -> torch.Tensor:
    """Compute the mean loss of a micro-batch from the logits."""
    logits = model(**forward_inputs(model, batch, task)).logits
    total = summed_loss(logits, batch["labels"], task, batch.get("weights"), smoothing)
    return total / batch["labels"].ne(IGNORE_INDEX).sum().clamp(min=1)


def fused_loss(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], task: str) -> torch.Tensor:
    """Compute the mean loss of a micro-batch in the head, for a model that TRL's trainer has prepared."""
    return model(**batch, use_cache=False, fused_lm_head=True).loss


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the cross entropy of a causal LM's tokens in nats, shape (rows, positions - 1); 0 outside the loss."""
    from torch.nn.functional import cross_entropy

    logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
    return cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=IGNORE_INDEX, reduction="none")


def fused_token_losses(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the same in the head: no logits are held."""
    return -model(**batch, use_cache=False, fused_lm_head=True).log_probs


def fused_row_sums(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute each row's summed loss, shape (rows,), in the head."""
    return fused_token_losses(model, batch).sum(-1)
