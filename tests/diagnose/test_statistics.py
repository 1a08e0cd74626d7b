"""Intervals that hold, pairs that cancel, documents that stay together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.diagnose.statistics import (
    MAX_RECORDED_ROWS,
    HeldOutLosses,
    mean_interval,
    paired_gain,
    recorded_rows,
    split_documents,
    wilson_interval,
)


def rows(sums, counts=None, documents=None):
    counts = [1] * len(sums) if counts is None else counts
    documents = range(len(sums)) if documents is None else documents
    return HeldOutLosses(tuple(map(float, sums)), tuple(counts), tuple(map(int, documents)))


def test_the_mean_is_of_tokens_not_of_rows():
    assert mean_interval(rows([10.0, 1.0], [10, 1])).mean == pytest.approx(1.0)
    assert paired_gain(rows([12.0, 1.0], [10, 2]), rows([6.0, 1.0], [10, 2])).mean == pytest.approx(0.5)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    chance, held = np.random.default_rng(0), 0
    for _ in range(300):
        found = mean_interval(rows(chance.normal(2.0, 1.0, size=60)))
        held += found.low <= 2.0 <= found.high
    assert 0.91 <= held / 300 <= 0.99


@pytest.mark.parametrize("num", [3, 5, 8, 20])
def test_few_documents_have_intervals_that_hold_too(num):
    chance, held = np.random.default_rng(num), 0
    for _ in range(300):
        found = mean_interval(rows(chance.normal(2.0, 1.0, size=num)))
        held += found.low <= 2.0 <= found.high
    assert held / 300 >= 0.90


def test_rows_of_one_document_are_not_independent():
    chance = np.random.default_rng(1)
    documents = np.repeat(np.arange(12), 20)
    sums = np.repeat(chance.normal(2.0, 1.0, size=12), 20) + chance.normal(0, 0.1, size=240)
    together, apart = mean_interval(rows(sums, documents=documents)), mean_interval(rows(sums))
    assert together.num_documents == 12
    assert together.high - together.low > 3 * (apart.high - apart.low)


def test_pairing_sees_what_two_means_do_not():
    chance = np.random.default_rng(2)
    hard = chance.gamma(2.0, 1.0, size=100)
    before, after = rows(hard), rows(hard - 0.05 + chance.normal(0, 0.02, size=100))
    assert paired_gain(before, after).low > 0.03
    one, other = mean_interval(before), mean_interval(after)
    assert one.low < other.mean < one.high


def test_more_looks_are_wider_and_one_document_has_no_interval():
    some = rows(np.linspace(0, 3, 80))
    once, often = mean_interval(some), mean_interval(some, looks=5)
    assert often.low < once.low
    assert often.high > once.high
    alone = mean_interval(rows([1.0, 2.0], documents=[7, 7]))
    assert (alone.low, alone.high) == (-np.inf, np.inf)


def test_other_rows_are_not_compared():
    with pytest.raises(ValueError, match="same rows"):
        paired_gain(rows([1.0, 2.0]), rows([1.0, 2.0], [2, 1]))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=200))
def test_the_two_halves_share_no_document(documents):
    deciding, reporting = split_documents(documents)
    assert sorted([*deciding, *reporting]) == list(range(len(documents)))
    assert not {documents[i] for i in deciding} & {documents[i] for i in reporting}
    assert deciding
    assert split_documents(documents) == (deciding, reporting)


@given(st.integers(0, 5000))
def test_so_many_rows_are_judged_one_by_one(num_rows):
    chosen = recorded_rows(num_rows)
    assert len(chosen) == min(num_rows, MAX_RECORDED_ROWS)
    assert chosen == sorted(set(chosen))
    assert all(0 <= i < num_rows for i in chosen)


def test_a_proportion_has_wilsons_interval():
    """The values of Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    found = wilson_interval(81 / 263, 263)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    none = wilson_interval(0.0, 20)
    assert (none.low, none.high) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.1611, abs=1e-4))
