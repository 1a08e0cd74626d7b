"""The train dataset: tokenized rows or packs of them, their order, and their collation into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from peftkit.data.read import dataset_from_rows, mapped_dataset
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.data.tokens.pack import pack_rows
from peftkit.data.tokens.store import Counts, StoredTokens, is_weighted
from peftkit.evaluate.losses import collate, collate_packed
from peftkit.methods.lora import EVA_TOKENS_PER_RANK
from peftkit.plan import Plan
from peftkit.plan.packing import FORMER_SAMPLINGS, GROUPED, WINDOW_STEPS, num_drawn_rows

_EVA_BATCHES = 32  # from which EVA starts: its components have long converged
_EVA_TOKENS = 512  # of a batch: few large ones converge sooner than many small ones
FILLER = -1  # in the place of a row: several processes need as many micro-batches each
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


def without_loss(row: Tokenized) -> Tokenized:
    """Return a row with no label in the loss."""
    return replace(row, labels=[IGNORE_INDEX] * len(row.labels))


@dataclass(frozen=True)
class TrainDataset:
    """The trainer's dataset, its collator, and the order in which rows or packs are drawn.

    A batch has, besides its tensors, `rows`: the numbers of its rows. A batch of packs also has `num_tokens`.
    """

    dataset: Any
    collator: Collator
    order: TrainOrder


def build_train_dataset(plan: Plan, rows: Sequence[Tokenized], pad_id: int) -> TrainDataset:
    """Build the trainer's dataset. A pack is held as row numbers, so that no token is stored twice."""
    if plan.train.packing:

        def packed(packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            numbers = [number for item in packs if not item.get("is_filler") for number in item["rows"]]
            documents = [
                [without_loss(rows[i]) if item.get("is_filler") else rows[i] for i in item["rows"]] for item in packs
            ]
            num_tokens = sum(len(rows[number].input_ids) for number in numbers)
            batch = collate_packed(documents, pad_id)
            row_numbers = torch.tensor(numbers, dtype=torch.long)
            return {**batch, "num_tokens": torch.tensor(num_tokens), "rows": row_numbers}

        packs = _pack_rows(plan, rows)
        dataset = dataset_from_rows([{"rows": numbers} for numbers in packs])
        return TrainDataset(dataset, packed, TrainOrder(plan, np.array([len(pack) for pack in packs])))

    def collated(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokenized = [Tokenized(list(row["input_ids"]), list(row["labels"]), "", row.get("weights")) for row in items]
        tokenized = [
            without_loss(row) if item.get("is_filler") else row for row, item in zip(tokenized, items, strict=True)
        ]
        batch = collate(tokenized, pad_id, task=plan.base.task)
        numbers = [row["row"] for row in items if not row.get("is_filler")]
        return {**batch, "rows": torch.tensor(numbers, dtype=torch.long)}

    columns = ["input_ids", "labels", *(["weights"] if is_weighted(rows) else [])]
    if isinstance(rows, StoredTokens):
        dataset = mapped_dataset(rows.paths, columns)
    else:
        dataset = dataset_from_rows([{name: getattr(row, name) for name in columns} for row in rows])
    dataset = dataset.add_column("row", np.arange(len(rows)))
    return TrainDataset(dataset, collated, TrainOrder(plan, _row_sizes(plan, rows)))


class TrainOrder(Sampler[int]):
    """A sampler of the rows of the whole training, one step after the other.

    Each pass over the rows is shuffled by itself, and the passes follow one another without a gap; the last
    step may have fewer rows. Grouped by length, windows of 50 steps are sorted by length and cut into
    micro-batches, and these are shuffled within the window, so that an optimizer step sees rows of all
    lengths. The order follows from the plan alone: any number of processes that share out a step's
    micro-batches train the same rows in it. What the last step lacks for each of several to have a whole one
    is `FILLER`.

    Example: lengths [9, 2, 8, 3], micro-batch 2, batch 4: the shuffled window (0, 1, 2, 3) sorts to 1, 3, 2,
    0; its micro-batches (1, 3) and (2, 0) are drawn in either order, and long rows are padded to long rows
    only.
    """

    def __init__(self, plan: Plan, sizes: NDArray[np.int32]) -> None:
        """Take the plan and the tokens of each row, or pack."""
        train, num_ranks = plan.train, plan.ranks.num
        self.sizes, self.seed = sizes, plan.seed
        self.num_rows, self.micro = num_drawn_rows(plan), train.micro_batch
        self.num_fillers = -self.num_rows % (self.micro * num_ranks) if num_ranks > 1 else 0
        self.is_grouped = FORMER_SAMPLINGS.get(train.sampling, train.sampling) == GROUPED
        self.window = train.batch_size * max(1, min(WINDOW_STEPS, len(sizes) // train.batch_size))

    def __len__(self) -> int:
        return self.num_rows + self.num_fillers

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(self.seed)
        pending = np.empty(0, np.int64)  # shuffled, not yet drawn
        for start in range(0, self.num_rows, self.window):
            num = min(self.window, self.num_rows - start)
            while len(pending) < num:
                pending = np.concatenate([pending, rng.permutation(len(self.sizes))])
            rows, pending = pending[:num], pending[num:]
            if self.is_grouped:
                rows = rows[np.argsort(self.sizes[rows], kind="stable")]
                # the smaller micro-batch is of any length, and the last
                split = self.micro * int(rng.integers(num // self.micro + 1))
                rest = rows[split : split + num % self.micro]
                whole = np.concatenate([rows[:split], rows[split + len(rest) :]]).reshape(-1, self.micro)
                rows = np.concatenate([rng.permutation(whole).reshape(-1), rest])
            yield from rows.tolist()
        yield from [FILLER] * self.num_fillers


class FilledDataset(Dataset[Any]):
    """A dataset with an item for `FILLER`: its first, with nothing in the loss."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return {**self.items[max(0, number)], "is_filler": number == FILLER}
