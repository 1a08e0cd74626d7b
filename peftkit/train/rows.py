"""What the trainer draws: tokenized rows or packs of them, in which order, and the batch they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from peftkit.data import to_dataset
from peftkit.data.mask import Tokenized
from peftkit.data.pack import pack
from peftkit.evaluate.losses import collate, collate_packed
from peftkit.plan import Plan
from peftkit.plan.packing import BY_LENGTH

Drawn = list[Tokenized]  # one row by itself, or the documents of a pack
Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


def drawn(plan: Plan, rows: Sequence[Tokenized]) -> list[Drawn]:
    """Everything that the trainer draws from."""
    if not plan.train.packing:
        return [[row] for row in rows]
    return [[rows[i] for i in numbers] for numbers in _packs(plan, rows)]


def _packs(plan: Plan, rows: Sequence[Tokenized]) -> list[list[int]]:
    return pack([len(row.input_ids) for row in rows], plan.data.max_length)


def longest_first(found: Sequence[Drawn], num: int) -> list[Drawn]:
    """The `num` longest: the micro-batch that takes the most memory."""
    return sorted(found, key=lambda one: sum(row.length for row in one), reverse=True)[:num]


def batch_of(plan: Plan, chosen: Sequence[Drawn], pad_id: int) -> dict[str, Any]:
    """The tensors of a micro-batch."""
    if plan.train.packing:
        return collate_packed(chosen, pad_id)
    return collate([row for one in chosen for row in one], pad_id, task=plan.base.task)


def training_set(plan: Plan, rows: Sequence[Tokenized], pad_id: int) -> tuple[Any, Collator | None]:
    """(the trainer's dataset, what makes a batch of its rows where the trainer's own does not).

    A pack is held by the numbers of its rows, so that no token is held twice.
    """
    if plan.train.packing:

        def collated(packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            chosen = [[rows[i] for i in one["rows"]] for one in packs]
            num_tokens = sum(len(row.input_ids) for one in chosen for row in one)
            return {**collate_packed(chosen, pad_id), "num_tokens": torch.tensor(num_tokens)}

        return to_dataset([{"rows": numbers} for numbers in _packs(plan, rows)]), collated
    found: list[dict[str, Any]] = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    if plan.train.sampling == BY_LENGTH:
        found = [{**columns, "length": row.length} for columns, row in zip(found, rows, strict=True)]
    return to_dataset(found), None


class SeededOrder(TrainerCallback):
    """Each epoch's order follows from the seed alone, so that a resumed run finds it again.

    transformers' sampler by length draws from the random state as it happens to be when the epoch begins.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.manual_seed(args.seed + int(state.epoch + 1e-9))
