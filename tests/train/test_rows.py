"""What the trainer draws, in which order, and the batches it makes."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from peftkit.data.mask import IGNORED, Tokenized
from peftkit.train.rows import SeededOrder, batch_of, longest, training_set
from tests.plans import cpu_plan

ROWS = [Tokenized([5] * size, [IGNORED] * (size - 1) + [5], "") for size in (40, 30, 20, 10, 50)]


def planned(**train):
    plan = cpu_plan()
    return replace(plan, train=replace(plan.train, **train))


def test_packs_are_held_by_the_numbers_of_their_rows():
    plan = planned(packing=True)
    dataset, collator = training_set(plan, ROWS, 0)
    assert dataset.column_names == ["rows"]
    assert list(dataset["rows"]) == [[0, 2], [1], [3, 4]]
    batch = collator([dataset[0], dataset[2]])
    assert int(batch.pop("num_tokens")) == 120
    same = batch_of(plan, [[ROWS[0], ROWS[2]], [ROWS[3], ROWS[4]]], 0)
    assert same.keys() == batch.keys()
    assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_rows_by_themselves_are_columns_with_a_length_where_it_is_needed():
    dataset, collator = training_set(planned(), ROWS, 0)
    assert collator is None and dataset.column_names == ["input_ids", "labels"]
    dataset, _ = training_set(planned(sampling="by length"), ROWS, 0)
    assert list(dataset["length"]) == [40, 30, 20, 10, 50]


def test_the_longest_come_first_in_packs_too():
    assert [row.length for [row] in longest(planned(), ROWS, 2)] == [50, 40]
    packs = longest(planned(packing=True), ROWS, 2)
    assert [sum(row.length for row in pack) for pack in packs] == [60, 60]


def test_an_epoch_has_its_own_order_and_a_resumed_one_the_same():
    def order(epoch):
        torch.rand(3)  # whatever was drawn before
        SeededOrder().on_epoch_begin(SimpleNamespace(seed=7), SimpleNamespace(epoch=epoch), None)
        return torch.randperm(50).tolist()

    assert order(1) == order(1.4) == order(1.9999)
    assert order(0) != order(1) != order(2)


def test_rows_on_disk_are_mapped_with_their_length_and_weights(tmp_path):
    from peftkit.data.store import TokenRows, Writer

    weighted = Tokenized([1, 2, 3], [IGNORED, 2, 3], "a", [1.0, 0.5, 2.0])
    writer = Writer(tmp_path / "rows.arrow")
    writer.write([*ROWS, weighted], list(range(6)))
    writer.close()
    stored = TokenRows([tmp_path / "rows.arrow"])
    dataset, _ = training_set(planned(sampling="by length"), stored, 0)
    assert dataset.column_names == ["input_ids", "labels", "weights", "length"]
    assert dataset[5] == {
        "input_ids": [1, 2, 3],
        "labels": [IGNORED, 2, 3],
        "weights": [1.0, 0.5, 2.0],
        "length": 3,
    }
    assert [row.length for [row] in longest(planned(), stored, 2)] == [50, 40]
