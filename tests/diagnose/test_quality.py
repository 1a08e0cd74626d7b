"""Lagging only against a target or a reference; else still improving, or plateaued."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.diagnose.quality import EvaluationPoint, assess_quality
from peftkit.diagnose.statistics import HeldOutLosses, Interval, wilson_interval

HARD = np.random.default_rng(0).gamma(4.0, 0.25, size=200)


def evaluation(step, loss, *, learnt=None, noise=0.0):
    chance = np.random.default_rng(step)
    sums = HARD + loss - HARD.mean() + chance.normal(0, noise, size=200)
    return EvaluationPoint(step, float(learnt or step), HeldOutLosses(tuple(sums), (1,) * 200, tuple(range(200))))


def curve(losses, **more):
    return [evaluation(100 * i, loss, **more) for i, loss in enumerate(losses)]


def test_without_a_target_nothing_lags():
    assert assess_quality(curve([4.0, 3.0, 2.0, 1.5]), target=None).state == "still improving"
    flat = curve([4.0, 1.5, 1.5, 1.5, 1.5], noise=0.02)
    assert assess_quality(flat, target=None).state == "plateaued"


@pytest.mark.parametrize(("target", "state"), [(0.9, "lagging"), (1.2, "not lagging"), (1.0, "not lagging")])
def test_a_target_is_missed_only_beyond_noise(target, state):
    found = assess_quality(curve([4.0, 2.0, 1.05]), target=target)
    assert found.state == state
    assert f"{target:g}" in found.said


def test_a_reference_decides_where_there_is_no_target():
    last = curve([4.0, 2.0, 1.5])
    better, alike = Interval(0.3, 0.2, 0.4, 200), Interval(0.005, 0.001, 0.009, 200)
    assert assess_quality(last, target=None, reference_gain=better).state == "lagging"
    assert assess_quality(last, target=None, reference_gain=alike).state == "not lagging", "within 1 % of the loss"
    assert assess_quality(last, target=9.0, reference_gain=better).state == "not lagging", (
        "a target is what was asked for"
    )


def test_a_target_in_a_metric_is_missed_beyond_the_noise_of_its_answers():
    last = curve([4.0, 2.0, 1.5])
    for right, state in ((0.6, "lagging"), (0.85, "not lagging"), (0.95, "not lagging")):
        assert assess_quality(last, target=0.9, metric_interval=wilson_interval(right, 100)).state == state


def test_a_decaying_rate_is_no_plateau():
    """The same losses: the last steps brought little at a constant rate, were short at a decaying one."""
    losses = [4.0, 2.0, 1.9, 1.85]
    constant = [evaluation(100 * i, loss, learnt=100 * i) for i, loss in enumerate(losses)]
    decaying = [
        evaluation(100 * i, loss, learnt=learnt)
        for i, (loss, learnt) in enumerate(zip(losses, [0.001, 100, 110, 115], strict=True))
    ]
    said = [assess_quality(one, target=None).projected.mean for one in (constant, decaying)]
    assert said[1] > 3 * said[0]


def test_what_got_worse_since_its_best_is_told():
    assert assess_quality(curve([4.0, 1.0, 1.4, 1.9]), target=None).worsened.mean == pytest.approx(0.9, abs=0.02)
    assert assess_quality(curve([4.0, 2.0, 1.0]), target=None).worsened is None


def test_a_single_evaluation_says_what_it_can():
    found = assess_quality([evaluation(50, 1.0)], target=None)
    assert found.state == "still improving"
    assert found.projected is None
    assert "train.eval_steps" in found.said


@given(st.floats(0.001, 5), st.floats(1.01, 100), st.floats(1.5, 10), st.integers(1, 30))
def test_a_projected_gain_never_exceeds_the_loss_there_is(last_loss, ratio, span, num):
    """Whatever fell before: what is left to gain is less than what is left."""
    losses = [
        HeldOutLosses((loss * 4,) * num, (4,) * num, tuple(range(num))) for loss in (last_loss * ratio, last_loss)
    ]
    points = [EvaluationPoint(1, 1.0, losses[0]), EvaluationPoint(2, span, losses[1])]
    projected = assess_quality(points, target=None).projected
    assert projected is not None
    assert 0 < projected.mean < last_loss
    assert projected.low * 0.999 <= projected.mean <= projected.high * 1.001
    assert projected.high <= last_loss


def test_a_small_gain_is_projected_as_the_logarithm_has_it():
    losses = [HeldOutLosses((loss,) * 12, (1,) * 12, tuple(range(12))) for loss in (2.02, 2.0)]
    points = [EvaluationPoint(1, 1.0, losses[0]), EvaluationPoint(2, 2.0, losses[1])]
    projected = assess_quality(points, target=None).projected
    assert projected.mean == pytest.approx(0.02 * math.log(1.5) / math.log(2), rel=0.02)
