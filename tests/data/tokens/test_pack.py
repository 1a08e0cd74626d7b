"""Packs lose nothing, exceed nothing, and are nearly full."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.tokens.pack import pack_rows, packing_efficiency

ROOM = 32


@given(st.lists(st.integers(1, ROOM), max_size=80))
def test_each_row_lies_in_one_pack_and_none_is_too_full(lengths):
    packs = pack_rows(lengths, ROOM)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= ROOM for rows in packs)
    assert all(rows == sorted(rows) for rows in packs)
    assert packs == pack_rows(lengths, ROOM)


@given(st.lists(st.integers(1, ROOM), min_size=1, max_size=80))
def test_hardly_more_packs_than_there_must_be(lengths):
    packs = pack_rows(lengths, ROOM)
    fewest = math.ceil(sum(lengths) / ROOM)
    assert fewest <= len(packs) < 2 * fewest + 1
    assert 0 < packing_efficiency(lengths, packs, ROOM) <= 1
    sizes = sorted(sum(lengths[row] for row in rows) for rows in packs)
    assert len(packs) < 2 or sizes[0] + sizes[1] > ROOM, "two packs that fit in one"


def test_rows_go_where_they_leave_the_least_room():
    assert pack_rows([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack_rows([], 10) == [] and packing_efficiency([], [], 10) == 1


def test_a_row_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match=r"longer than a pack of 4 tokens: \[1\]"):
        pack_rows([4, 5], 4)


@pytest.mark.parametrize("room", [2048, 131072])
def test_many_rows_fill_their_packs(room):
    draw = Random(0)
    lengths = [draw.randint(1, room // 4) for _ in range(50_000)]
    packs = pack_rows(lengths, room)
    assert packing_efficiency(lengths, packs, room) > 0.99
