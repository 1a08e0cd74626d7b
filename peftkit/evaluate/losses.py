"""Loss on held-out rows: the exact mean over the tokens in the loss, independent of the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit import interrupt, ranks
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.evaluate import step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def collate(rows: Sequence[Tokenized], pad_id: int, *, task: str = "causal-lm") -> dict[str, Any]:
    """Return right-padded tensors of shape (rows, longest): input_ids, attention_mask, labels.

    Labels have shape (rows,) for classification, (rows, classes) for multi-label, (rows, longest target) for
    seq2seq. Where any row has
    weights, "weights" has the shape of the labels.
    """
    import torch

    longest = max(len(row.input_ids) for row in rows)
    longest_labels = max(len(row.labels) for row in rows)

    def padded(values: list[int], fill: int, length: int) -> list[int]:
        return values + [fill] * (length - len(values))

    labels = (
        [row.labels[0] for row in rows]
        if task == "classification"
        else [padded(row.labels, IGNORE_INDEX, longest_labels) for row in rows]
    )
    batch = {
        "input_ids": torch.tensor([padded(row.input_ids, pad_id, longest) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0, longest) for row in rows]),
        "labels": torch.tensor(labels),
    }
    if any(row.weights for row in rows):
        weight_rows = [row.weights or [1.0] * len(row.labels) for row in rows]
        num_labels = 1 if task == "classification" else longest_labels
        weights = torch.tensor([row_weights + [0.0] * (num_labels - len(row_weights)) for row_weights in weight_rows])
        batch["weights"] = weights[:, 0] if task == "classification" else weights
    return batch


def collate_packed(packs: Sequence[Sequence[Tokenized]], pad_id: int) -> dict[str, Any]:
    """Return tensors of shape (packs, longest pack): input_ids, position_ids, labels; no attention_mask.

    Positions restart at 0 with each document: without a mask and a cache transformers separates documents by
    them. A document's first token has no label, because the document before it would predict it. Padding at
    the end of a pack is a document of its own.
    """
    import torch

    longest = max(sum(len(row.input_ids) for row in pack) for pack in packs)
    ids, positions, labels = [], [], []
    for pack in packs:
        num_padding = longest - sum(len(row.input_ids) for row in pack)
        ids.append([i for row in pack for i in row.input_ids] + [pad_id] * num_padding)
        positions.append([i for row in pack for i in range(len(row.input_ids))] + [*range(num_padding)])
        labels.append([i for row in pack for i in (IGNORE_INDEX, *row.labels[1:])] + [IGNORE_INDEX] * num_padding)
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor(values) for name, values in columns.items()}


ForwardFunction = Callable[[Any, Mapping[str, Any]], Any]


def evaluation_batches(
    model: PreTrainedModel,
    rows: Sequence[Tokenized],
    *,
    pad_id: int,
    batch_size: int,
    task: str,
    autocast: str | None,
    shared: bool = False,
    forward: ForwardFunction | None = None,
) -> Iterator[tuple[list[int], dict[str, Any], Any]]:
    """Yield (row indices, batch, output) of the model in evaluation mode, rows of similar length together.

    `forward` computes the output from model and batch, by default the model itself. The model's training mode
    is restored, no random number is drawn, and an interrupt is handled between batches. Where the batches are
    `shared`, those of this rank.
    """
    import torch

    interrupt.stop_if_requested("interrupted while evaluating")
    place = ranks.current() if shared else ranks.Ranks()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size)[place.rank :: place.num]:
            interrupt.stop_if_requested("interrupted while evaluating")
            indices = order[start : start + batch_size]
            collated = collate([rows[i] for i in indices], pad_id, task=task)
            batch = step.to_device(model, collated)
            with torch.no_grad(), step.autocast(model, autocast):
                output = forward(model, batch) if forward else model(**step.forward_inputs(model, batch, task))
                yield indices, batch, output
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class RowLosses:
    """Summed cross entropy (nats) and number of tokens in the loss, by row, in the rows' order."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per token in the loss (per class or tag for the classification tasks)."""
        return sum(self.sums) / sum(self.counts)


def row_losses(
    model: PreTrainedModel,
    rows: Sequence[Tokenized],
    *,
    pad_id: int,
    batch_size: int,
    task: str = "causal-lm",
    autocast: str | None = None,
    shared: bool = False,
    forward_sums: ForwardFunction | None = None,
) -> RowLosses:
    """Compute the loss of each row, summed over its labels in the loss (tokens, classes, tags).

    `forward_sums` returns the (rows,) sums of a batch for models that can compute them without all logits.
    `shared`: each rank computes some of the batches, the same for any number of ranks, and all get all sums.
    The loss is computed from logits: some methods add a penalty to the model's own loss (AdaLoRA).
    Raises ValueError where no label is in the loss.
    """
    import torch

    sums, counts = [0.0] * len(rows), [0] * len(rows)
    for indices, batch, output in evaluation_batches(
        model,
        rows,
        pad_id=pad_id,
        batch_size=batch_size,
        task=task,
        autocast=autocast,
        shared=shared,
        forward=forward_sums,
    ):
        labels = batch["labels"][:, 1:] if task == "causal-lm" else batch["labels"]
        loss_tokens = (labels != IGNORE_INDEX).reshape(len(indices), -1).sum(-1).tolist()
        row_sums = output
        if forward_sums is None:
            pairs = zip(output.logits.split(1), batch["labels"].split(1), strict=True)
            row_sums = torch.stack([step.summed_loss(logits, labels, task) for logits, labels in pairs])
        for row, total, count in zip(indices, row_sums.tolist(), loss_tokens, strict=True):
            sums[row], counts[row] = total, count
    if shared:
        sums, counts = ranks.total(sums), [int(count) for count in ranks.total(counts)]
    if not any(counts):
        raise ValueError("no token in the loss in the held-out rows")
    return RowLosses(tuple(sums), tuple(counts))


def span_losses(
    model: PreTrainedModel,
    rows: Sequence[Tokenized],
    spans: Sequence[tuple[int, int]],
    *,
    pad_id: int,
    batch_size: int,
    autocast: str | None = None,
    forward_tokens: ForwardFunction | None = None,
) -> list[RowLosses]:
    """Compute the loss of each row by spans of positions, [start, end), for a causal LM: one RowLosses a span.

    `forward_tokens` returns the (rows, positions - 1) losses of a batch for models that can compute them without all
    logits.
    """
    sums = [[0.0] * len(rows) for _ in spans]
    counts = [[0] * len(rows) for _ in spans]
    for indices, batch, output in evaluation_batches(
        model, rows, pad_id=pad_id, batch_size=batch_size, task="causal-lm", autocast=autocast, forward=forward_tokens
    ):
        losses = step.token_losses(output.logits, batch["labels"]) if forward_tokens is None else output
        in_loss = batch["labels"][:, 1:] != IGNORE_INDEX
        losses = losses[:, -in_loss.shape[1] :]  # virtual tokens may precede them
        for number, (start, end) in enumerate(spans):
            # column i is of the token at position i + 1
            columns = slice(max(0, start - 1), end - 1)
            totals, nums = losses[:, columns].sum(-1).tolist(), in_loss[:, columns].sum(-1).tolist()
            for row, total, num in zip(indices, totals, nums, strict=True):
                sums[number][row], counts[number][row] = total, num
    return [RowLosses(tuple(s), tuple(c)) for s, c in zip(sums, counts, strict=True)]


def predict_classes(
    model: PreTrainedModel,
    rows: Sequence[Tokenized],
    *,
    pad_id: int,
    batch_size: int,
    task: str,
    autocast: str | None = None,
) -> list[list[int]]:
    """Return the likeliest classes in the order of `rows`: one per row or per labelled token.

    Of multi-label, all those more likely than not.
    """
    predictions: list[list[int]] = [[] for _ in rows]
    for indices, batch, output in evaluation_batches(
        model, rows, pad_id=pad_id, batch_size=batch_size, task=task, autocast=autocast
    ):
        likeliest = output.logits.argmax(-1)
        for position, row in enumerate(indices):
            if task == "classification":
                predictions[row] = [int(likeliest[position])]
            elif task == "multi-label":
                predictions[row] = [int(value) for value in (output.logits[position] > 0).nonzero()[:, 0]]
            else:
                in_loss = batch["labels"][position] != IGNORE_INDEX
                predictions[row] = [int(value) for value in likeliest[position][in_loss]]
    return predictions
