"""What the trainer draws, in which order, and the batches it makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.plan.packing import GROUPED, SHUFFLED
from peftkit.plan.plan import RanksPlan
from peftkit.train.batches import (
    FILLER,
    FilledDataset,
    TrainOrder,
    batches_of_tokens,
    build_train_dataset,
    collate_groups,
    longest_groups,
)
from tests.rigs.plans import cpu_plan

ROWS = [Tokenized([5] * size, [IGNORE_INDEX] * (size - 1) + [5], "") for size in (40, 30, 20, 10, 50)]


def planned(**train):
    plan = cpu_plan()
    return replace(plan, train=replace(plan.train, **train))


def test_packs_are_held_by_the_numbers_of_their_rows():
    plan = planned(packing=True)
    drawn = build_train_dataset(plan, ROWS, 0)
    dataset = drawn.dataset
    assert dataset.column_names == ["rows"]
    assert list(dataset["rows"]) == [[0, 2], [1], [3, 4]]
    batch = drawn.collator([dataset[0], dataset[2]])
    assert int(batch.pop("num_tokens")) == 120
    assert batch.pop("rows").tolist() == [0, 2, 3, 4]
    same = collate_groups(plan, [[ROWS[0], ROWS[2]], [ROWS[3], ROWS[4]]], 0)
    assert same.keys() == batch.keys()
    assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_rows_by_themselves_are_columns():
    drawn = build_train_dataset(planned(), ROWS, 0)
    assert drawn.dataset.column_names == ["input_ids", "labels", "row"]
    batch = drawn.collator([drawn.dataset[3], drawn.dataset[1]])
    assert batch.pop("rows").tolist() == [3, 1]
    same = collate_groups(planned(), [[ROWS[3]], [ROWS[1]]], 0)
    assert same.keys() == batch.keys()
    assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_the_longest_come_first_in_packs_too():
    assert [row.length for [row] in longest_groups(planned(), ROWS, 2)] == [50, 40]
    packs = longest_groups(planned(packing=True), ROWS, 2)
    assert [sum(row.length for row in pack) for pack in packs] == [60, 60]


def cut(order, size):
    numbers = list(order)
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def test_rows_grouped_by_length_are_alike_in_a_micro_batch_and_not_in_a_step():
    sizes = np.array([*range(2, 66), *range(2, 66)], np.int32)
    plan = planned(sampling=GROUPED, micro_batch=4, batch_size=16, num_steps=16)
    order = TrainOrder(plan, sizes)
    first_pass = cut(order, 4)[:32]
    assert sorted(number for batch in first_pass for number in batch) == list(range(128))
    lengths = [sizes[batch] for batch in first_pass]
    assert max(batch.max() - batch.min() for batch in lengths) <= 8
    assert sum(np.ptp(sizes[step]) > 20 for step in cut(order, 16)) >= 12
    assert list(order) == list(order), "the order follows from the plan alone"
    assert list(order)[128:] != list(order)[:128], "each pass is shuffled by itself"
    assert list(order) != list(TrainOrder(replace(plan, seed=plan.seed + 1), sizes))
    former = replace(plan, train=replace(plan.train, sampling="by length"))
    assert list(order) == list(TrainOrder(former, sizes))


@given(*[st.integers(1, most) for most in (70, 6, 6, 20, 36)], st.sampled_from([SHUFFLED, GROUPED]))
def test_the_passes_over_all_rows_follow_one_another(num_rows, micro, accumulation, num_steps, missing, sampling):
    sizes = np.array([2 + i * 7 % 40 for i in range(num_rows)], np.int32)
    batch_size = micro * accumulation
    num = num_steps * batch_size - missing % batch_size
    plan = planned(micro_batch=micro, batch_size=batch_size, num_steps=num_steps, sampling=sampling, num_rows=num)
    order = TrainOrder(plan, sizes)
    drawn = list(order)
    assert len(drawn) == len(order) == num
    counts = np.bincount(drawn, minlength=num_rows)
    assert counts.max() - counts.min() <= 1, "no row is drawn twice before all were drawn once"
    longer = TrainOrder(replace(plan, train=replace(plan.train, num_steps=num_steps + 1)), sizes)
    if sampling == SHUFFLED:
        assert list(longer)[: len(drawn)] == drawn, "a longer run begins alike"


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("sampling", [SHUFFLED, GROUPED])
def test_ranks_train_the_rows_of_one(num_ranks, sampling):
    """accelerate deals micro-batches out in turn: with the accumulation divided, a step has the same rows."""
    sizes = np.array([2 + i * 7 % 40 for i in range(50)], np.int32)  # no multiple of the batch
    alone_plan = planned(micro_batch=2, batch_size=8, num_steps=13, sampling=sampling, num_rows=99)
    alone = cut(TrainOrder(alone_plan, sizes), 8)
    order = TrainOrder(replace(alone_plan, ranks=RanksPlan(num_ranks, "ddp")), sizes)
    assert len(alone[-1]) == 3 and order.num_fillers == {2: 1, 4: 5}[num_ranks]
    sampler = BatchSampler(order, 2, drop_last=False)
    dealt = [list(BatchSamplerShard(sampler, num_ranks, rank, even_batches=True)) for rank in range(num_ranks)]
    accumulation = 4 // num_ranks
    for step, rows in enumerate(alone):
        taken = [b for batches in dealt for b in batches[step * accumulation : (step + 1) * accumulation]]
        assert sorted(n for batch in taken for n in batch if n != FILLER) == sorted(rows)
    assert len({len(batches) for batches in dealt}) == 1, "each has as many"


@pytest.mark.parametrize("packing", [False, True])
def test_a_filler_is_a_row_with_nothing_in_the_loss(packing):
    drawn = build_train_dataset(planned(packing=packing), ROWS, 0)
    dataset = FilledDataset(drawn.dataset)
    batch, without = drawn.collator([dataset[1], dataset[FILLER]]), drawn.collator([dataset[1]])
    assert int(batch["labels"].ne(IGNORE_INDEX).sum()) == int(without["labels"].ne(IGNORE_INDEX).sum()) > 0
    assert len(dataset) == len(drawn.dataset)


def test_rows_on_disk_are_mapped_with_their_weights(tmp_path):
    from peftkit.data.tokens.store import StoredTokens, TokenWriter

    weighted = Tokenized([1, 2, 3], [IGNORE_INDEX, 2, 3], "a", [1.0, 0.5, 2.0])
    writer = TokenWriter(tmp_path / "rows.arrow")
    writer.write([*ROWS, weighted], list(range(6)))
    writer.close()
    stored = StoredTokens([tmp_path / "rows.arrow"])
    dataset = build_train_dataset(planned(), stored, 0).dataset
    assert dataset.column_names == ["input_ids", "labels", "weights", "row"]
    row = {"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX, 2, 3], "weights": [1.0, 0.5, 2.0], "row": 5}
    assert dataset[5] == row
    assert [row.length for [row] in longest_groups(planned(), stored, 2)] == [50, 40]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 200))
def test_batches_of_tokens_are_large_enough(lengths, min_tokens):
    rows = [Tokenized([7] * length, [7] * length, "") for length in lengths]
    batches = batches_of_tokens(rows, min_tokens, pad_id=0)
    counts = [int(batch["attention_mask"].sum()) for batch in batches]
    assert sum(counts) <= sum(lengths)
    assert len(batches) <= 32
    assert all(count >= min(min_tokens, sum(lengths)) for count in counts)
    assert all(torch.equal(batch["input_ids"] == 7, batch["attention_mask"] == 1) for batch in batches)
