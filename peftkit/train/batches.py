"""The train dataset: tokenized rows or packs of them, their order, and their collation into batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftkit.data.read import dataset_from_rows, mapped_dataset
from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.pack import pack_rows
from peftkit.data.tokens.store import Counts, StoredTokens, is_weighted
from peftkit.evaluate.losses import collate, collate_packed
from peftkit.plan import Plan
from peftkit.plan.packing import BY_LENGTH, WINDOW_STEPS

BatchRows = list[Tokenized]  # one row by itself, or the documents of a pack
Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


def _pack_rows(plan: Plan, rows: Sequence[Tokenized]) -> list[list[int]]:
    return pack_rows(Counts.of(rows).tokens.tolist(), plan.data.max_length)


def row_groups(plan: Plan, rows: Sequence[Tokenized]) -> list[list[int]]:
    """Return the row numbers of each dataset item: the rows of a pack, or one row."""
    return _pack_rows(plan, rows) if plan.train.packing else [[number] for number in range(len(rows))]


def longest_groups(plan: Plan, rows: Sequence[Tokenized], num: int) -> list[BatchRows]:
    """Return the `num` longest rows or packs: the micro-batch that takes most memory."""
    counts = Counts.of(rows)
    sizes = np.maximum(counts.tokens, counts.labels)
    groups = row_groups(plan, rows)
    largest = sorted(groups, key=lambda numbers: int(sizes[numbers].sum()), reverse=True)[:num]
    return [[rows[number] for number in numbers] for numbers in largest]


def collate_groups(plan: Plan, groups: Sequence[BatchRows], pad_id: int) -> dict[str, Any]:
    """Collate rows or packs into the tensors of a micro-batch."""
    if plan.train.packing:
        return collate_packed(groups, pad_id)
    return collate([row for group in groups for row in group], pad_id, task=plan.base.task)


@dataclass(frozen=True)
class TrainDataset:
    """The trainer's dataset and its collator.

    A batch has, besides its tensors, `rows`: the numbers of its rows. A batch of packs also has `num_tokens`.
    """

    dataset: Any
    collator: Collator


def build_train_dataset(plan: Plan, rows: Sequence[Tokenized], pad_id: int) -> TrainDataset:
    """Build the trainer's dataset. A pack is held as row numbers, so that no token is stored twice."""
    if plan.train.packing:

        def packed(packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            numbers = [number for item in packs for number in item["rows"]]
            documents = [[rows[i] for i in item["rows"]] for item in packs]
            num_tokens = sum(len(row.input_ids) for item in documents for row in item)
            batch = collate_packed(documents, pad_id)
            return {**batch, "num_tokens": torch.tensor(num_tokens), "rows": torch.tensor(numbers)}

        return TrainDataset(dataset_from_rows([{"rows": numbers} for numbers in _pack_rows(plan, rows)]), packed)

    def collated(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokenized = [Tokenized(list(row["input_ids"]), list(row["labels"]), "", row.get("weights")) for row in items]
        batch = collate(tokenized, pad_id, task=plan.base.task)
        return {**batch, "rows": torch.tensor([row["row"] for row in items])}

    columns = ["input_ids", "labels", *(["weights"] if is_weighted(rows) else [])]
    if isinstance(rows, StoredTokens):
        dataset = mapped_dataset(rows.paths, columns)
    else:
        dataset = dataset_from_rows([{name: getattr(row, name) for name in columns} for row in rows])
    dataset = dataset.add_column("row", np.arange(len(rows)))
    by_length = plan.train.sampling == BY_LENGTH
    return TrainDataset(dataset.select(order_by_length(plan, rows)) if by_length else dataset, collated)


def order_by_length(plan: Plan, rows: Sequence[Tokenized]) -> list[int]:
    """Return the numbers of all rows that training draws, in order, with similar lengths in a micro-batch.

    Each epoch is shuffled, windows of it are sorted by length and cut into micro-batches, and these are
    shuffled within the window, so that an optimizer step sees rows of all lengths. It follows from the seed
    alone.

    Example: lengths [9, 2, 8, 3], micro-batch 2, batch 4: the shuffled window (0, 1, 2, 3) sorts to 1, 3, 2,
    0; its micro-batches (1, 3) and (2, 0) are drawn in either order, and long rows are padded to long rows
    only.
    """
    counts = Counts.of(rows)
    sizes = np.maximum(counts.tokens, counts.labels)
    micro, total = plan.train.micro_batch, (plan.train.num_steps or 0) * plan.train.batch_size
    rng = np.random.default_rng(plan.seed)
    num_epochs = -(-total // len(rows))
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(num_epochs)])[:total]
    step = plan.train.batch_size
    window = step * max(1, min(WINDOW_STEPS, len(rows) // step))  # no more than an epoch
    windows = []
    for start in range(0, total, window):
        window_rows = order[start : start + window]
        micro_batches = window_rows[np.argsort(sizes[window_rows], kind="stable")].reshape(-1, micro)
        windows.append(micro_batches[rng.permutation(len(micro_batches))].ravel())
    return [int(number) for number in np.concatenate(windows)]
