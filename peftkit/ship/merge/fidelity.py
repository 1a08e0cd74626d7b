"""Is what was written what was trained? Logits of both on the same prompts, and the loss of both.

Compared is what a reader loads from the disk, never what a writer had in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.data.tokens.mask import Tokenized
from peftkit.evaluate.losses import RowLosses, batches, row_losses

_NUMBERS = 2**26  # logits kept of a model: 256 MiB in fp32
_BATCH_ROWS = 4
_MOST_ROWS, _MOST_TOKENS = 16, 256  # of what logits are compared on
# mean KL divergence in nats: what rounding weights once can do, by the width of their numbers
_LIMIT = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-3}
_FLOOR = 1e-7  # below it the adapter itself does nothing
_SHARE = 0.05  # of what the adapter changes

PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps for a while.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return",
    "Question: A train leaves at 9:40 and arrives at 12:05. How long does the journey take?\nAnswer:",
    "La tour Eiffel a été construite entre 1887 et 1889 par les ouvriers de",
    "Dear customer, thank you for your message of 14 March. We have looked into it, and",
    "水は百度で沸騰し、零度で",
)


@dataclass(frozen=True)
class Outputs:
    """What a model says of `num_texts`: logits (positions, vocabulary) in fp32, and losses of rows."""

    logits: torch.Tensor
    num_texts: int
    losses: RowLosses | None


@dataclass(frozen=True)
class Fidelity:
    """How far a model is from a reference. `kl` is the mean of KL(reference || model) in nats.

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
        """Why it is not the same model, in words; empty where it is, within what `dtype` can hold."""
        hint = "" if dtype == "float32" else f"; {dtype} may be too coarse for this adapter: --dtype float32"
        if not self.kl <= _LIMIT[dtype]:
            most = f"{_LIMIT[dtype]:g}"
            return f"a KL divergence of {self.kl:.2g}, more than the {most} that rounding may cause{hint}"
        if self.effect is None or self.kl <= max(_FLOOR, _SHARE * self.effect):
            return ""
        share = self.kl / max(self.effect, 1e-12)
        return f"a KL divergence of {self.kl:.2g}, {share:.0%} of what the adapter changes{hint}"


def prompts(tokenizer: Any, task: str) -> list[Tokenized]:
    """Rows to compare on where there are no held-out ones: short texts of several kinds."""
    found = []
    for text in PROMPTS:
        ids = list(tokenizer(text)["input_ids"])
        if ids:
            found.append(Tokenized(ids, ids if task != "classification" else [0], "prompt"))
    return found


def outputs(
    model: Any, rows: Sequence[Tokenized], *, pad_id: int, task: str, judged: Sequence[Tokenized] = ()
) -> Outputs:
    """Logits on the first of `rows` and the first tokens of each, and the loss on `judged`, whole."""
    short = [_shortened(row, task) for row in rows[:_MOST_ROWS]]
    kept, room, num_texts = [], _NUMBERS, 0
    for chosen, batch, output in batches(
        model, short, pad_id=pad_id, batch_size=_BATCH_ROWS, task=task, autocast=None
    ):
        found = output.logits.float().cpu()
        if found.ndim == 3:
            length = found.shape[1]
            mask = batch["attention_mask"] if task != "seq2seq" else batch["labels"] >= 0
            found = found[mask[:, :length].bool().cpu()]
        found = found[: max(1, room // found.shape[-1])]
        room -= found.numel()
        num_texts += len(chosen)
        kept.append(found)
        if room <= 0:
            break
    losses = None
    if judged:
        losses = row_losses(model, judged, pad_id=pad_id, batch_size=_BATCH_ROWS, task=task)
    return Outputs(torch.cat(kept), num_texts, losses)


def _shortened(row: Tokenized, task: str) -> Tokenized:
    labels = row.labels if task == "classification" else row.labels[:_MOST_TOKENS]
    return Tokenized(row.input_ids[:_MOST_TOKENS], labels, row.where)


def compare(reference: Outputs, other: Outputs, *, without: Outputs | None = None) -> Fidelity:
    """How far `other` is from `reference`; `without` is the reference's base alone."""
    kl = divergences(reference.logits, other.logits)
    same = reference.logits.argmax(-1) == other.logits.argmax(-1)
    return Fidelity(
        kl=float(kl.mean()),
        kl_most=float(kl.max()),
        max_abs_difference=float((reference.logits - other.logits).abs().max()),
        top1_agreement=float(same.double().mean()),
        effect=float(divergences(reference.logits, without.logits).mean()) if without else None,
        loss_reference=reference.losses.mean if reference.losses else None,
        loss=other.losses.mean if other.losses else None,
        num_prompts=reference.num_texts,
        num_positions=len(kl),
    )


def divergences(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) in nats at each position, in fp64; infinite where one is not finite."""
    found = []
    for first, second in zip(torch.split(reference, 64), torch.split(other, 64), strict=True):
        a, b = first.double().log_softmax(-1), second.double().log_softmax(-1)
        found.append((a.exp() * (a - b)).sum(-1).clamp(min=0.0))
    return torch.cat(found).nan_to_num(nan=float("inf"))
