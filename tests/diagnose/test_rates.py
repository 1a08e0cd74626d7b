"""The best learning rate is found from the losses of forks, whatever the usual one was."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.diagnose.rates import STEPS_EXPONENT, RateArm, choose_rate, next_rate
from peftkit.diagnose.statistics import HeldOutLosses
from peftkit.methods import base

NUM_ROWS, COUNT = 16, 8
NOISE = np.random.default_rng(0).normal(0, 0.3, NUM_ROWS)
LENGTHS = {"fork_steps": 12, "num_steps": 1200}
CORRECTION = 0.9 * math.pow(12 / 1200, STEPS_EXPONENT)


def rows_of(loss, paired_noise=0.001):
    """Held-out rows with a mean loss; what rows differ by is common to all arms, but for a little."""
    rng = np.random.default_rng(int(loss * 1e6))
    sums = COUNT * (loss + NOISE - NOISE.mean() + rng.normal(0, paired_noise, NUM_ROWS))
    return HeldOutLosses(tuple(sums.tolist()), (COUNT,) * NUM_ROWS, tuple(range(NUM_ROWS)))


START = rows_of(4.0)


def search(loss_of, usual, max_forks=8):
    """Make the forks that are asked for; a loss of None is not finite."""
    arms = []
    while (rate := next_rate(arms, START, usual=usual, max_forks=max_forks)) is not None:
        loss = loss_of(rate)
        arms.append(RateArm(rate, None if loss is None else rows_of(loss)))
        assert len(arms) <= max_forks
    return arms, choose_rate(arms, START, usual=usual, is_exact=True, **LENGTHS)


def bowl(best):
    """A loss with its minimum at a rate, and a cliff four times above it."""
    return lambda rate: None if rate > 8 * best else 2.0 + 0.1 * math.log2(rate / best) ** 2


@settings(deadline=None, max_examples=40)
@given(st.floats(-6, -2), st.floats(-3, 3))
def test_the_vertex_is_found_from_a_usual_rate_that_is_wrong_by_eight_either_way(exponent, octaves):
    best = 10**exponent
    arms, choice = search(bowl(best), usual=best * 2**octaves)
    assert choice.rate == pytest.approx(best * CORRECTION, rel=0.06)
    assert choice.interval[0] <= choice.rate * 1.01 and choice.interval[1] >= choice.rate * 0.99
    assert len(arms) <= 7
    assert len({arm.rate for arm in arms}) == len(arms)


def test_no_more_forks_are_made_than_may_be_and_half_the_edge_is_then_taken():
    arms, choice = search(bowl(1e-3), usual=1e-4, max_forks=4)
    assert len(arms) == 4
    assert choice.rate == pytest.approx(2e-4 * CORRECTION, rel=0.01)


def test_where_every_rate_does_harm_lower_ones_are_tried_and_then_the_usual_one_is_kept_with_a_warning():
    arms, choice = search(lambda rate: None, usual=1.0)
    assert sorted(arm.rate for arm in arms) == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2]
    assert choice.rate == 1.0 and choice.warns and "no fork was better" in choice.said
    # where lower ones do good, the search goes on from there
    arms, choice = search(bowl(0.02), usual=1.0, max_forks=12)
    assert choice.rate == pytest.approx(0.02 * CORRECTION, rel=0.06) and not choice.warns


def test_a_fork_that_did_harm_counts_as_one_that_did_nothing():
    losses = {0.5: 2.1, 1.0: 2.0, 2.0: 400.0}
    _, choice = search(losses.get, usual=1.0)
    _, diverged = search({**losses, 2.0: None}.get, usual=1.0)
    assert choice.rate == diverged.rate
    assert 0.7 * CORRECTION < choice.rate < CORRECTION


def test_rates_that_the_forks_do_not_tell_apart_leave_the_usual_one():
    rng = np.random.default_rng(3)

    def noisy(rate):
        sums = COUNT * (3.0 + rng.normal(0, 0.5, NUM_ROWS))
        return RateArm(rate, HeldOutLosses(tuple(sums.tolist()), START.counts, START.documents))

    arms = [noisy(rate) for rate in (1.0, 0.5, 2.0)]
    assert next_rate(arms, START, usual=1.0, max_forks=8) is None
    choice = choose_rate(arms, START, usual=1.0, is_exact=True, **LENGTHS)
    assert choice.rate == 1.0 and "do not tell" in choice.said and not choice.warns


@pytest.mark.parametrize(("factor", "is_near"), [(1.5, True), (0.6, True), (2.5, False), (0.3, False)])
def test_short_forks_overrule_a_usual_rate_that_is_far_off_and_else_move_it_half_way(factor, is_near):
    best = CORRECTION * 1e-3
    usual = best / factor
    arms, _ = search(bowl(1e-3), usual)
    choice = choose_rate(arms, START, usual=usual, is_exact=False, **LENGTHS)
    assert choice.rate == pytest.approx(math.sqrt(best * usual) if is_near else best, rel=0.04)
    assert ("the middle" in choice.said) == is_near


def test_one_law_of_the_steps_serves_the_usual_rate_and_the_correction():
    assert STEPS_EXPONENT == base.STEPS_EXPONENT
