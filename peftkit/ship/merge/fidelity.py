"""Fidelity of a written model: logits of it and its reference on the same texts, and the loss of both.

Compared is what a reader loads from the disk, never what a writer had in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftkit.data.tokens.mask import Tokenized
from peftkit.evaluate.losses import RowLosses, evaluation_batches, row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_LOGITS = 2**26  # logits kept of a model: 256 MiB in fp32
_BATCH_ROWS = 4
_MAX_TEXTS, _MAX_TEXT_TOKENS = 16, 256  # of what logits are compared on
# mean KL divergence in nats: what rounding weights once can do, by the width of their numbers
_MAX_KL = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-3}
_KL_FLOOR = 1e-7  # below it the adapter itself does nothing
_MAX_EFFECT_SHARE = 0.05  # of what the adapter changes

PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps for a while.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return",
    "Question: A train leaves at 9:40 and arrives at 12:05. How long does the journey take?\nAnswer:",
    "La tour Eiffel a été construite entre 1887 et 1889 par les ouvriers de",
    "Dear customer, thank you for your message of 14 March. We have looked into it, and",
    "水は百度で沸騰し、零度で",
)


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of a model on `num_texts` texts: logits (positions, vocabulary) in fp32, and losses of rows."""

    logits: torch.Tensor
    num_texts: int
    losses: RowLosses | None


@dataclass(frozen=True)
class Fidelity:
    """Distance of a model from a reference. `kl` is the mean of KL(reference || model) in nats.

    `effect` is that of the reference from its base without the adapter: what there is to keep.
    """

    kl: float
    kl_most: float
    max_abs_difference: float
    top1_agreement: float
    effect: float | None
    loss_reference: float | None
    loss: float | None
    num_prompts: int
    num_positions: int

    def problem(self, dtype: str) -> str:
        """Return why it is not the same model; empty where it is within what `dtype` can hold."""
        hint = "" if dtype == "float32" else f"; {dtype} may be too coarse for this adapter: --dtype float32"
        if not self.kl <= _MAX_KL[dtype]:
            limit = f"{_MAX_KL[dtype]:g}"
            return f"a KL divergence of {self.kl:.2g}, more than the {limit} that rounding may cause{hint}"
        if self.effect is None or self.kl <= max(_KL_FLOOR, _MAX_EFFECT_SHARE * self.effect):
            return ""
        share = self.kl / max(self.effect, 1e-12)
        return f"a KL divergence of {self.kl:.2g}, {share:.0%} of what the adapter changes{hint}"


def prompt_rows(tokenizer: PreTrainedTokenizerBase, task: str) -> list[Tokenized]:
    """Return rows to compare on where none are held out: short texts of several kinds."""
    rows = []
    for text in PROMPTS:
        ids = list(tokenizer(text)["input_ids"])
        if ids:
            rows.append(Tokenized(ids, ids if task != "classification" else [0], "prompt"))
    return rows


def compute_outputs(
    model: PreTrainedModel, rows: Sequence[Tokenized], *, pad_id: int, task: str, loss_rows: Sequence[Tokenized] = ()
) -> ModelOutputs:
    """Compute logits on the first tokens of the first `rows`, and the loss on all of `loss_rows`."""
    num_ids = model.get_input_embeddings().weight.shape[0]  # a tokenizer may know more tokens than its base has
    rows = [row for row in rows if max(row.input_ids) < num_ids] or [Tokenized([0, 0], [0, 0], "a token")]
    short_rows = [
        Tokenized(
            row.input_ids[:_MAX_TEXT_TOKENS],
            (row.labels if task == "classification" else row.labels[:_MAX_TEXT_TOKENS]),
            row.where,
        )
        for row in rows[:_MAX_TEXTS]
    ]
    logits, num_left, num_texts = [], _MAX_LOGITS, 0
    for batch_rows, batch, output in evaluation_batches(
        model, short_rows, pad_id=pad_id, batch_size=_BATCH_ROWS, task=task, autocast=None
    ):
        batch_logits = output.logits.float().cpu()
        if batch_logits.ndim == 3:
            length = batch_logits.shape[1]
            mask = batch["attention_mask"] if task != "seq2seq" else batch["labels"] >= 0
            batch_logits = batch_logits[mask[:, :length].bool().cpu()]
        batch_logits = batch_logits[: max(1, num_left // batch_logits.shape[-1])]
        num_left -= batch_logits.numel()
        num_texts += len(batch_rows)
        logits.append(batch_logits)
        if num_left <= 0:
            break
    losses = None
    if loss_rows:
        losses = row_losses(model, loss_rows, pad_id=pad_id, batch_size=_BATCH_ROWS, task=task)
    return ModelOutputs(torch.cat(logits), num_texts, losses)


def measure_fidelity(
    reference: ModelOutputs, other: ModelOutputs, *, base_outputs: ModelOutputs | None = None
) -> Fidelity:
    """Measure how far `other` is from `reference`; `base_outputs` is the reference's base alone."""
    kl = kl_divergences(reference.logits, other.logits)
    same_top = reference.logits.argmax(-1) == other.logits.argmax(-1)
    return Fidelity(
        kl=float(kl.mean()),
        kl_most=float(kl.max()),
        max_abs_difference=float((reference.logits - other.logits).abs().max()),
        top1_agreement=float(same_top.double().mean()),
        effect=float(kl_divergences(reference.logits, base_outputs.logits).mean()) if base_outputs else None,
        loss_reference=reference.losses.mean if reference.losses else None,
        loss=other.losses.mean if other.losses else None,
        num_prompts=reference.num_texts,
        num_positions=len(kl),
    )


def kl_divergences(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Compute KL(reference || other) in nats at each position, in fp64; infinite where one is not finite.

    sum_v p_v (log p_v - log q_v) of softmax(logits): (positions, vocabulary) twice -> (positions,).
    """
    parts = []
    for first, second in zip(torch.split(reference, 64), torch.split(other, 64), strict=True):
        log_p, log_q = first.double().log_softmax(-1), second.double().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0.0))
    return torch.cat(parts).nan_to_num(nan=float("inf"))
