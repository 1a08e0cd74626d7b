"""What the trainer draws: tokenized rows or packs of them, in which order, and the batch they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftkit.data.read import mapped_dataset, to_dataset
from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.pack import pack
from peftkit.data.tokens.store import Counts, TokenRows, is_weighted
from peftkit.evaluate.losses import collate, collate_packed
from peftkit.plan import Plan
from peftkit.plan.packing import BY_LENGTH, WINDOW_STEPS

Drawn = list[Tokenized]  # one row by itself, or the documents of a pack
Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


def _packs(plan: Plan, rows: Sequence[Tokenized]) -> list[list[int]]:
    return pack(Counts.of(rows).tokens.tolist(), plan.data.max_length)


def drawn_from(plan: Plan, rows: Sequence[Tokenized]) -> list[list[int]]:
    """The numbers of the rows in each thing that the trainer draws: packs, or rows by themselves."""
    return _packs(plan, rows) if plan.train.packing else [[number] for number in range(len(rows))]


def longest(plan: Plan, rows: Sequence[Tokenized], num: int) -> list[Drawn]:
    """The `num` longest rows or packs that the trainer draws from: the micro-batch that takes most memory."""
    counts = Counts.of(rows)
    sizes = np.maximum(counts.tokens, counts.labels)
    found = drawn_from(plan, rows)
    first = sorted(found, key=lambda numbers: int(sizes[numbers].sum()), reverse=True)[:num]
    return [[rows[number] for number in numbers] for numbers in first]


def batch_of(plan: Plan, chosen: Sequence[Drawn], pad_id: int) -> dict[str, Any]:
    """The tensors of a micro-batch."""
    if plan.train.packing:
        return collate_packed(chosen, pad_id)
    return collate([row for one in chosen for row in one], pad_id, task=plan.base.task)


@dataclass(frozen=True)
class DrawnSet:
    """What the trainer draws from, and what makes a micro-batch of it.

    A batch brings, beside its tensors, `rows`: the numbers of its rows. One of packs brings `num_tokens`.
    """

    dataset: Any
    collator: Collator


def training_set(plan: Plan, rows: Sequence[Tokenized], pad_id: int) -> DrawnSet:
    """The trainer's dataset. A pack is held by the numbers of its rows, so that no token is held twice."""
    if plan.train.packing:

        def packed(packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            numbers = [number for one in packs for number in one["rows"]]
            chosen = [[rows[i] for i in one["rows"]] for one in packs]
            num_tokens = sum(len(row.input_ids) for one in chosen for row in one)
            made = collate_packed(chosen, pad_id)
            return {**made, "num_tokens": torch.tensor(num_tokens), "rows": torch.tensor(numbers)}

        return DrawnSet(to_dataset([{"rows": numbers} for numbers in _packs(plan, rows)]), packed)

    def collated(drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokenized = [
            Tokenized(list(row["input_ids"]), list(row["labels"]), "", row.get("weights")) for row in drawn
        ]
        made = collate(tokenized, pad_id, task=plan.base.task)
        return {**made, "rows": torch.tensor([row["row"] for row in drawn])}

    columns = ["input_ids", "labels", *(["weights"] if is_weighted(rows) else [])]
    if isinstance(rows, TokenRows):
        found = mapped_dataset(rows.paths, columns)
    else:
        found = to_dataset([{name: getattr(row, name) for name in columns} for row in rows])
    found = found.add_column("row", np.arange(len(rows)))
    ordered = plan.train.sampling == BY_LENGTH
    return DrawnSet(found.select(order_by_length(plan, rows)) if ordered else found, collated)


def order_by_length(plan: Plan, rows: Sequence[Tokenized]) -> list[int]:
    """The numbers of all rows that training draws, in order: what stands together in a micro-batch is alike.

    Each epoch's rows are shuffled, windows of them sorted by length and cut into micro-batches, and these
    shuffled again, so that an optimizer step sees rows of all lengths. It follows from the seed alone.
    """
    counts = Counts.of(rows)
    sizes = np.maximum(counts.tokens, counts.labels)
    micro, total = plan.train.micro_batch, (plan.train.num_steps or 0) * plan.train.batch_size
    chance = np.random.default_rng(plan.seed)
    num_epochs = -(-total // len(rows))
    drawn = np.concatenate([chance.permutation(len(rows)) for _ in range(num_epochs)])[:total]
    step = plan.train.batch_size
    window = step * max(1, min(WINDOW_STEPS, len(rows) // step))  # no more than an epoch
    found = []
    for start in range(0, total, window):
        part = drawn[start : start + window]
        alike = part[np.argsort(sizes[part], kind="stable")].reshape(-1, micro)
        found.append(alike[chance.permutation(len(alike))].ravel())
    return [int(number) for number in np.concatenate(found)]
