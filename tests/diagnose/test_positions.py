"""Where the loss by position rises, on losses made up."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.diagnose.positions import MAX_STRETCH, NUM_SPANS, SpanLosses, equal_spans, find_reaches, stretch_factor
from peftkit.diagnose.statistics import HeldOutLosses

SPAN = 64


def spans(*losses, num_rows=40, noise=0.1, tokens=SPAN):
    """One span a loss, each of `num_rows` documents of unlike difficulty."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 0.5, size=num_rows)
    made = []
    for number, loss in enumerate(losses):
        means = loss + difficulty + rng.normal(0, noise, size=num_rows)
        rows = HeldOutLosses(tuple(tokens * means), (tokens,) * num_rows, tuple(range(num_rows)))
        made.append(SpanLosses(number * SPAN, (number + 1) * SPAN, rows))
    return made


def test_a_loss_that_falls_or_wavers_has_no_end():
    assert find_reaches(spans(4.0, 3.6, 3.5, 3.45)) == []
    assert find_reaches(spans(4.0, 3.5, 3.55, 3.52)) == []
    assert find_reaches(spans(4.0, 3.5, 3.9, num_rows=6)) == [], "too few documents to tell"


def test_a_rise_is_where_positions_may_end():
    assert find_reaches(spans(4.0, 3.5, 3.9, 4.5)) == [2 * SPAN], "the lowest span ends where the rise begins"
    assert find_reaches(spans(4.0, 3.5, 3.55, 4.5)) == [2 * SPAN, 3 * SPAN]


def test_spans_without_tokens_in_the_loss_are_passed_over():
    empty = spans(0.0, tokens=0)[0]
    assert find_reaches([empty, *spans(4.0, 3.5, 4.5)]) == [2 * SPAN]


@given(st.integers(1, 100_000))
def test_spans_cover_every_position_once(longest):
    made = equal_spans(longest)
    assert len(made) == min(NUM_SPANS, longest)
    assert made[0][0] == 0
    assert made[-1][1] == longest
    assert all(a[1] == b[0] for a, b in pairwise(made))


@pytest.mark.parametrize(("longest", "reach", "factor"), [(512, 128, 4), (513, 128, 5), (200, 190, 2), (320, 10, 32)])
def test_the_stretch_brings_the_longest_row_within_reach(longest, reach, factor):
    assert stretch_factor(longest, reach) == factor <= MAX_STRETCH


def test_what_no_stretch_reaches_is_not_stretched():
    assert stretch_factor(10 * MAX_STRETCH + 1, 10) is None
