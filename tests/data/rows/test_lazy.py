import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.rows.lazy import MappedSequence, Subset


def test_picked_are_in_the_order_of_their_numbers():
    picked = Subset("abcdef", [4, 0, 2])
    assert (list(picked), picked[0], picked[-1], picked[1:]) == (["e", "a", "c"], "e", "c", ["a", "c"])
    assert list(Subset("abcdef", range(2, 4))) == ["c", "d"]


@given(items=st.lists(st.integers()), index=st.slices(8))
def test_a_lazy_sequence_is_a_sequence(items, index):
    made = MappedSequence(items, lambda number: number + 1)
    wanted = [number + 1 for number in items]
    assert (list(made), len(made), made[index]) == (wanted, len(wanted), wanted[index])
    with pytest.raises(IndexError):
        made[len(items)]
    with pytest.raises(IndexError):
        made[-len(items) - 1]
