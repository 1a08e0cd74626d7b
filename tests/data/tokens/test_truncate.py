import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.data.tokens.truncate import TruncationCounts, refuse_long_rows, truncate
from peftkit.errors import UserError
from peftkit.plan.plan import DataPlan


def plan(truncation, room):
    return DataPlan((), None, "text", {}, "all", truncation, room)


def row(length, masked=0):
    ids = list(range(length))
    return Tokenized(ids, [IGNORE_INDEX] * masked + ids[masked:], "f:1")


@given(length=st.integers(2, 200), room=st.integers(3, 50))
def test_splitting_keeps_every_token_in_order(length, room):
    pieces = truncate(row(length), plan("split", room), TruncationCounts())
    assert [token for piece in pieces for token in piece.input_ids] == list(range(length))
    assert all(len(piece.input_ids) <= room for piece in pieces)


def test_pieces_that_teach_nothing_are_left_out():
    [piece] = truncate(row(30, masked=20), plan("split", 20), TruncationCounts())
    assert piece.input_ids == list(range(20, 30))


def test_keeping_the_end_counts_what_is_lost():
    found = TruncationCounts()
    [cut] = truncate(row(30, masked=10), plan("keep_end", 15), found)
    assert cut.input_ids == list(range(15, 30))
    assert (found.num_cut, found.num_learnt, found.num_learnt_lost) == (1, 20, 5)


def test_dropping_counts_and_names():
    found = TruncationCounts()
    assert truncate(row(30), plan("drop", 10), found) == []
    assert truncate(row(5), plan("drop", 10), found) == [row(5)]
    assert (found.num_dropped, found.num_rows, found.longest, found.shortest) == (1, 2, 30, 5)
    assert found.too_long == [("f:1", 30)]


def test_weights_are_cut_with_their_tokens():
    weighted = Tokenized([1, 2, 3], [1, 2, 3], "f:1", [0.1, 0.2, 0.3])
    assert weighted.cut(1, 3).weights == [0.2, 0.3]


def test_long_rows_are_refused_on_request():
    found = TruncationCounts()
    truncate(row(30), plan("error", 10), found)
    with pytest.raises(UserError, match="f:1: got 30 tokens, expected at most 10"):
        refuse_long_rows([found], plan("error", 10))
    refuse_long_rows([found], plan("drop", 10))
