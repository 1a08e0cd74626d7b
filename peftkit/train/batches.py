"""The train dataset: tokenized rows or packs of them, their order, and their collation into batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler

from peftkit.data.read import dataset_from_rows, mapped_dataset
from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.pack import pack_rows
from peftkit.data.tokens.store import Counts, StoredTokens, is_weighted
from peftkit.evaluate.losses import collate, collate_packed
from peftkit.methods.lora import EVA_TOKENS_PER_RANK
from peftkit.plan import Plan
from peftkit.plan.packing import BY_LENGTH, WINDOW_STEPS

_EVA_BATCHES = 32  # from which EVA starts: its components have long converged
_EVA_TOKENS = 512  # of a batch: few large ones converge sooner than many small ones
BatchRows = list[Tokenized]  # one row by itself, or the documents of a pack
Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


def _pack_rows(plan: Plan, rows: Sequence[Tokenized]) -> list[list[int]]:
    return pack_rows(Counts.of(rows).tokens.tolist(), plan.data.max_length)


def row_groups(plan: Plan, rows: Sequence[Tokenized]) -> list[list[int]]:
    """Return the row numbers of each dataset item: the rows of a pack, or one row."""
    return _pack_rows(plan, rows) if plan.train.packing else [[number] for number in range(len(rows))]


def _row_sizes(plan: Plan, rows: Sequence[Tokenized]) -> NDArray[np.int32]:
    """Return the tokens of each row; of an encoder-decoder's longer side."""
    counts = Counts.of(rows)
    return np.maximum(counts.tokens, counts.labels) if plan.base.task == "seq2seq" else counts.tokens


def longest_groups(plan: Plan, rows: Sequence[Tokenized], num: int) -> list[BatchRows]:
    """Return the `num` longest rows or packs: the micro-batch that takes most memory."""
    sizes = _row_sizes(plan, rows)
    groups = row_groups(plan, rows)
    largest = sorted(groups, key=lambda numbers: int(sizes[numbers].sum()), reverse=True)[:num]
    return [[rows[number] for number in numbers] for numbers in largest]


def collate_groups(plan: Plan, groups: Sequence[BatchRows], pad_id: int) -> dict[str, Any]:
    """Collate rows or packs into the tensors of a micro-batch."""
    if plan.train.packing:
        return collate_packed(groups, pad_id)
    return collate([row for group in groups for row in group], pad_id, task=plan.base.task)


def eva_batches(plan: Plan, rows: Sequence[Tokenized], *, pad_id: int) -> list[dict[str, torch.Tensor]]:
    """Return the batches whose activations EVA starts from; none for other starts."""
    spec = plan.method.peft
    if spec is None or spec.arguments.get("init_lora_weights") != "eva":
        return []
    min_tokens = max(_EVA_TOKENS, EVA_TOKENS_PER_RANK * int(spec.arguments["r"]))
    return batches_of_tokens(rows, min_tokens, pad_id=pad_id)


def batches_of_tokens(rows: Sequence[Tokenized], min_tokens: int, *, pad_id: int) -> list[dict[str, torch.Tensor]]:
    """Return at most `_EVA_BATCHES` batches of the first rows, each of at least `min_tokens` beside padding.

    Rows that do not make up a last batch join the one before.
    """
    groups: list[list[list[int]]] = [[]]
    num_tokens = 0
    for row in rows:
        if num_tokens >= min_tokens:
            if len(groups) == _EVA_BATCHES:
                break
            groups.append([])
            num_tokens = 0
        groups[-1].append(row.input_ids)
        num_tokens += len(row.input_ids)
    if num_tokens < min_tokens and len(groups) > 1:
        last_rows = groups.pop()
        groups[-1].extend(last_rows)
    batches = []
    for group in groups:
        length = max(map(len, group))
        ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in group])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in group])
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@dataclass(frozen=True)
class TrainDataset:
    """The trainer's dataset and its collator.

    A batch has, besides its tensors, `rows`: the numbers of its rows. A batch of packs also has `num_tokens`.
    Without `batches` the trainer draws rows at random.
    """

    dataset: Any
    collator: Collator
    batches: LengthGroupedBatches | None = None


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
    batches = LengthGroupedBatches(plan, rows) if plan.train.sampling == BY_LENGTH else None
    return TrainDataset(dataset, collated, batches)


class LengthGroupedBatches(BatchSampler):
    """A batch sampler of micro-batches with rows of like length: each epoch every row once.

    Each epoch is shuffled, windows of it are sorted by length and cut into micro-batches, and these are
    shuffled within the window, so that an optimizer step sees rows of all lengths. An epoch's last micro-batch
    may be smaller. The order follows from the seed and the epoch alone.

    Example: lengths [9, 2, 8, 3], micro-batch 2, batch 4: the shuffled window (0, 1, 2, 3) sorts to 1, 3, 2,
    0; its micro-batches (1, 3) and (2, 0) are drawn in either order, and long rows are padded to long rows
    only.
    """

    def __init__(self, plan: Plan, rows: Sequence[Tokenized]) -> None:
        self.sizes = _row_sizes(plan, rows)
        self.seed, self.step, self.epoch = plan.seed, plan.train.batch_size, 0
        self.batch_size, self.drop_last = plan.train.micro_batch, False

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.sizes) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        num_rows, micro = len(self.sizes), self.batch_size
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(num_rows)
        window = self.step * max(1, min(WINDOW_STEPS, num_rows // self.step))  # no more than an epoch
        for start in range(0, num_rows, window):
            rows = order[start : start + window]
            rows = rows[np.argsort(self.sizes[rows], kind="stable")]
            # the smaller micro-batch is of any length, and the epoch's last
            split = micro * int(rng.integers(len(rows) // micro + 1))
            rest = rows[split : split + len(rows) % micro]
            full = np.concatenate([rows[:split], rows[split + len(rest) :]]).reshape(-1, micro)
            for number in rng.permutation(len(full)):
                yield full[number].tolist()
            if len(rest):
                yield rest.tolist()
