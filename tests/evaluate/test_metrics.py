import pytest

from peftkit.evaluate.metrics import exact_match


def test_exact_match_ignores_blanks_at_the_ends_only():
    assert exact_match(["a ", "b", "c c"], ["a", "x", "cc"]) == pytest.approx(1 / 3)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="no answers"):
        exact_match([], [])
    with pytest.raises(ValueError, match="2 answers for 1 references"):
        exact_match(["a", "b"], ["a"])
