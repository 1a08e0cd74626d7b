"""What the trainer draws, in which order, and the batches it makes."""

from dataclasses import replace

import torch

from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.train.batches import build_train_dataset, collate_groups, longest_groups, order_by_length
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
    plan = planned(sampling="by length", micro_batch=1, batch_size=1, num_steps=5)
    dataset = build_train_dataset(plan, ROWS, 0).dataset
    assert sorted(len(ids) for ids in dataset["input_ids"]) == [10, 20, 30, 40, 50]


def test_the_longest_come_first_in_packs_too():
    assert [row.length for [row] in longest_groups(planned(), ROWS, 2)] == [50, 40]
    packs = longest_groups(planned(packing=True), ROWS, 2)
    assert [sum(row.length for row in pack) for pack in packs] == [60, 60]


def test_rows_by_length_are_alike_in_a_micro_batch_and_not_in_a_step():
    rows = [Tokenized([5] * size, [5] * size, "") for size in (*range(2, 66), *range(2, 66))]
    plan = planned(sampling="by length", micro_batch=4, batch_size=16, num_steps=20)
    order = order_by_length(plan, rows)
    assert len(order) == 320
    counts = [order.count(number) for number in range(128)]
    assert (min(counts), max(counts)) == (2, 3), "two and a half epochs"
    lengths = [rows[number].length for number in order]
    micro = [lengths[start : start + 4] for start in range(0, 320, 4)]
    assert max(max(one) - min(one) for one in micro) <= 8
    steps = [lengths[start : start + 16] for start in range(0, 320, 16)]
    assert sum(max(one) - min(one) > 20 for one in steps) >= 15
    assert order == order_by_length(plan, rows)
    assert order != order_by_length(replace(plan, seed=plan.seed + 1), rows)


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
