"""What the trainer draws, in which order, and the batches it makes."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.train.batches import (
    LengthGroupedBatches,
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
    assert build_train_dataset(planned(), ROWS, 0).batches is None
    assert build_train_dataset(planned(sampling="by length"), ROWS, 0).batches is not None


def test_the_longest_come_first_in_packs_too():
    assert [row.length for [row] in longest_groups(planned(), ROWS, 2)] == [50, 40]
    packs = longest_groups(planned(packing=True), ROWS, 2)
    assert [sum(row.length for row in pack) for pack in packs] == [60, 60]


def test_rows_by_length_are_alike_in_a_micro_batch_and_not_in_a_step():
    rows = [Tokenized([5] * size, [5] * size, "") for size in (*range(2, 66), *range(2, 66))]
    plan = planned(sampling="by length", micro_batch=4, batch_size=16)
    batches = LengthGroupedBatches(plan, rows)
    epoch = list(batches)
    assert sorted(number for batch in epoch for number in batch) == list(range(128))
    lengths = [[rows[number].length for number in batch] for batch in epoch]
    assert max(max(batch) - min(batch) for batch in lengths) <= 8
    steps = [[n for batch in lengths[start : start + 4] for n in batch] for start in range(0, 32, 4)]
    assert sum(max(step) - min(step) > 20 for step in steps) >= 6
    assert epoch == list(batches), "the order follows from seed and epoch alone"
    batches.set_epoch(1)
    assert epoch != list(batches)
    assert epoch != list(LengthGroupedBatches(replace(plan, seed=plan.seed + 1), rows))


@given(st.integers(1, 70), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))
def test_an_epoch_by_length_draws_every_row_once(num_rows, micro, accumulation, epoch):
    rows = [Tokenized([5] * (2 + i * 7 % 40), [5] * (2 + i * 7 % 40), "") for i in range(num_rows)]
    batches = LengthGroupedBatches(planned(micro_batch=micro, batch_size=micro * accumulation), rows)
    batches.set_epoch(epoch)
    drawn = list(batches)
    assert sorted(number for batch in drawn for number in batch) == list(range(num_rows))
    assert len(drawn) == len(batches)
    assert {len(batch) for batch in drawn[:-1]} <= {micro}, "the last alone may be smaller"


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
