"""Loss on held-out rows: exactly the mean over learnt tokens, whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit import interrupt
from peftkit.data.tokens.mask import IGNORED, Tokenized


def collate(rows: Sequence[Tokenized], pad_id: int, *, task: str = "causal-lm") -> dict[str, Any]:
    """Right-padded tensors of shape (rows, longest): input_ids, attention_mask, labels.

    The labels of classification have shape (rows,), those of seq2seq the length of the longest target. Where
    some row has weights there are weights of the labels' shape.
    """
    import torch

    longest = max(len(row.input_ids) for row in rows)
    longest_labels = max(len(row.labels) for row in rows)

    def padded(values: list[int], fill: int, length: int) -> list[int]:
        return values + [fill] * (length - len(values))

    labels = (
        [row.labels[0] for row in rows]
        if task == "classification"
        else [padded(row.labels, IGNORED, longest_labels) for row in rows]
    )
    made = {
        "input_ids": torch.tensor([padded(row.input_ids, pad_id, longest) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row.input_ids), 0, longest) for row in rows]),
        "labels": torch.tensor(labels),
    }
    if any(row.weights for row in rows):
        each = [row.weights or [1.0] * len(row.labels) for row in rows]
        most = 1 if task == "classification" else longest_labels
        weights = torch.tensor([one + [0.0] * (most - len(one)) for one in each])
        made["weights"] = weights[:, 0] if task == "classification" else weights
    return made


def collate_packed(packs: Sequence[Sequence[Tokenized]], pad_id: int) -> dict[str, Any]:
    """Tensors of shape (packs, longest pack): input_ids, position_ids, labels, and no attention_mask.

    Positions start anew with each document: by that transformers keeps documents apart where there is
    neither a mask nor a cache. Nothing is learnt at a document's first token, which the one before it would
    predict. What fills up a pack is a document of its own.
    """
    import torch

    longest = max(sum(len(row.input_ids) for row in pack) for pack in packs)
    ids, positions, labels = [], [], []
    for pack in packs:
        rest = longest - sum(len(row.input_ids) for row in pack)
        ids.append([i for row in pack for i in row.input_ids] + [pad_id] * rest)
        positions.append([i for row in pack for i in range(len(row.input_ids))] + [*range(rest)])
        labels.append([i for row in pack for i in (IGNORED, *row.labels[1:])] + [IGNORED] * rest)
    made = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor(values) for name, values in made.items()}


Call = Callable[[Any, Mapping[str, Any]], Any]


def batches(
    model: Any,
    rows: Sequence[Tokenized],
    *,
    pad_id: int,
    batch_size: int,
    task: str,
    autocast: str | None,
    call: Call | None = None,
) -> Iterator[tuple[list[int], dict[str, Any], Any]]:
    """(positions in `rows`, batch, output) of the model in evaluation mode, rows of like length together.

    `call` gives the output for a model and a batch, where it is not the model's own.
    The model's training mode is restored, no random number is drawn, and a signal is heard between batches.
    """
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(autocast or "")
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            interrupt.stop_if_requested("interrupted while evaluating")
            chosen = order[start : start + batch_size]
            made = collate([rows[i] for i in chosen], pad_id, task=task)
            batch = {key: value.to(model.device) for key, value in made.items()}
            with torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
                output = call(model, batch) if call else model(**inputs_of(model, batch, task))
                yield chosen, batch, output
    finally:
        model.train(was_training)


def inputs_of(model: Any, batch: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A batch without labels; an encoder-decoder reads its target shifted by one instead."""
    inputs = {key: value for key, value in batch.items() if key not in {"labels", "weights", "rows"}}
    if task == "seq2seq":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(batch["labels"])
    return inputs


def summed_loss(logits: Any, labels: Any, task: str, weights: Any = None) -> Any:
    """Cross entropy in nats, summed over what is learnt, each label times its weight where there are weights.

    A decoder's positions predict the next token; virtual tokens may stand before them.
    """
    from torch.nn.functional import cross_entropy

    if task == "causal-lm":
        logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
        weights = None if weights is None else weights[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    if weights is None:
        return cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")
    each = cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="none")
    return (each * weights.reshape(-1)).sum()


@dataclass(frozen=True)
class RowLosses:
    """Cross entropy in nats summed over what is learnt in each row, and how much that is, in rows' order."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per learnt token, class or tag."""
        return sum(self.sums) / sum(self.counts)


def row_losses(
    model: Any,
    rows: Sequence[Tokenized],
    *,
    pad_id: int,
    batch_size: int,
    task: str = "causal-lm",
    autocast: str | None = None,
    summed: Call | None = None,
) -> RowLosses:
    """The loss of each row, summed over what is learnt in it (tokens, classes, tags).

    `summed` gives the sum of each of a batch's rows where the model can without holding all logits.

    It is worked out from the logits: some methods add a penalty to the model's own loss (AdaLoRA).
    Raises ValueError where nothing is learnt.
    """
    sums, counts = [0.0] * len(rows), [0] * len(rows)
    for chosen, batch, output in batches(
        model, rows, pad_id=pad_id, batch_size=batch_size, task=task, autocast=autocast, call=summed
    ):
        labels = batch["labels"][:, 1:] if task == "causal-lm" else batch["labels"]
        learnt = (labels != IGNORED).reshape(len(chosen), -1).sum(-1).tolist()
        each = output if summed else _sums(output.logits, batch["labels"], task)
        for row, total, count in zip(chosen, each.tolist(), learnt, strict=True):
            sums[row], counts[row] = total, count
    if not any(counts):
        raise ValueError("no learnt token in the held-out rows")
    return RowLosses(tuple(sums), tuple(counts))


def _sums(logits: Any, labels: Any, task: str) -> Any:
    """The summed loss of each row, of shape (rows,)."""
    import torch

    return torch.stack(
        [summed_loss(logits[i : i + 1], labels[i : i + 1], task) for i in range(labels.shape[0])]
    )


def predict(
    model: Any,
    rows: Sequence[Tokenized],
    *,
    pad_id: int,
    batch_size: int,
    task: str,
    autocast: str | None = None,
) -> list[list[int]]:
    """The likeliest classes: one per row, or one per tagged token of a row, in the order of `rows`."""
    found: list[list[int]] = [[] for _ in rows]
    for chosen, batch, output in batches(
        model, rows, pad_id=pad_id, batch_size=batch_size, task=task, autocast=autocast
    ):
        best = output.logits.argmax(-1)
        for position, row in enumerate(chosen):
            if task == "classification":
                found[row] = [int(best[position])]
            else:
                kept = batch["labels"][position] != IGNORED
                found[row] = [int(value) for value in best[position][kept]]
    return found
