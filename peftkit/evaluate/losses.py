"""Loss on held-out rows: exactly the mean over learnt tokens, whatever the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftkit import interrupt
from peftkit.data.mask import IGNORED, Tokenized


def collate(rows: Sequence[Tokenized], pad_id: int) -> dict[str, Any]:
    """Right-padded tensors of shape (rows, longest): input_ids, attention_mask, labels."""
    import torch

    longest = max(len(row.input_ids) for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(row.input_ids, pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
        "labels": torch.tensor([padded(row.labels, IGNORED) for row in rows]),
    }


def mean_token_loss(
    model: Any, rows: Sequence[Tokenized], *, pad_id: int, batch_size: int, autocast: str | None = None
) -> float:
    """Cross entropy in nats, summed over learnt tokens and divided by their number.

    The model's training mode is restored, no random number is drawn, and a signal is heard between batches.
    Raises ValueError where no token is learnt.
    """
    import torch

    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(autocast or "")
    was_training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    try:
        for start in range(0, len(ordered), batch_size):
            interrupt.stop_if_requested("interrupted while evaluating")
            batch = {
                k: v.to(model.device) for k, v in collate(ordered[start : start + batch_size], pad_id).items()
            }
            # the first token is never predicted, so its label never counts
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            if count == 0:
                continue
            with torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
                total += float(model(**batch).loss) * count
            num_tokens += count
    finally:
        model.train(was_training)
    if num_tokens == 0:
        raise ValueError("no learnt token in the held-out rows")
    return total / num_tokens
