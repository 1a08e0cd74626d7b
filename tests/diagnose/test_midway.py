"""The order of suspicion in mid-run, on evidence made up: what is asked for, what is said, and what is acted on."""

from dataclasses import replace

import pytest

from peftkit.diagnose.midway import MAX_UPDATE_PACE, MIN_UPDATE_PACE, measure_or_conclude_midway
from peftkit.diagnose.statistics import Interval
from tests.diagnose.test_causes import arms, evidence, quality, signals

HEALTHY = evidence(quality=quality("lagging"), progress=0.15, update_pace=1.5)


def test_a_healthy_run_costs_its_signals_only():
    assert measure_or_conclude_midway(replace(HEALTHY, signals=None)) == "signals"
    assert measure_or_conclude_midway(HEALTHY).cause == "none"
    assert measure_or_conclude_midway(replace(HEALTHY, update_pace=None)).cause == "none"
    assert (
        "signals"
        in measure_or_conclude_midway(replace(HEALTHY, signals=None, unaffordable=frozenset({"signals"}))).said
    )


def test_layers_without_an_adapter_are_tried():
    wide = replace(HEALTHY, candidate="target modules", progress=0.04)
    assert measure_or_conclude_midway(wide) == "continue"
    grown = measure_or_conclude_midway(replace(wide, arms=arms(**{"continue": 1.9, "rate_up": 1.85, "candidate": 1.4})))
    assert (grown.cause, grown.proven) == ("target modules", True)
    disguised = arms(**{"continue": 1.9, "rate_up": 1.3, "candidate": 1.4})
    assert measure_or_conclude_midway(replace(wide, arms=disguised)).cause == "none", "it is the rate, but too early"


def test_averaging_alone_is_no_reason_to_begin_anew():
    fast = replace(HEALTHY, update_pace=2 * MAX_UPDATE_PACE, progress=0.04)
    both = arms(**{"continue": 1.5, "start_over": 1.5})
    assert measure_or_conclude_midway(replace(fast, arms=both)).cause == "none"


@pytest.mark.parametrize(("loss", "cause"), [(1.5, "learning rate too high"), (2.1, "none"), (None, "none")])
def test_a_new_adapter_at_a_lower_rate_has_to_win(loss, cause):
    fast = replace(HEALTHY, update_pace=2 * MAX_UPDATE_PACE, progress=0.04)
    assert measure_or_conclude_midway(fast) == "continue"
    fast = replace(fast, arms=arms(**{"continue": 2.05}))
    assert measure_or_conclude_midway(fast) == "start over"
    found = measure_or_conclude_midway(replace(fast, arms={**fast.arms, **arms(start_over=loss)}))
    assert (found.cause, found.proven) == (cause, cause != "none")


def test_a_higher_rate_is_tried_late_enough_and_has_to_win():
    slow = replace(HEALTHY, update_pace=MIN_UPDATE_PACE / 2)
    assert measure_or_conclude_midway(replace(slow, progress=0.04)).cause == "none"
    assert measure_or_conclude_midway(slow) == "continue"
    assert measure_or_conclude_midway(replace(slow, arms=arms(**{"continue": 1.9}))) == "rate up"
    better = measure_or_conclude_midway(replace(slow, arms=arms(**{"continue": 1.9, "rate_up": 1.6})))
    assert (better.cause, better.proven, better.arm) == ("learning rate too low", True, "rate up")
    assert measure_or_conclude_midway(replace(slow, arms=arms(**{"continue": 1.9, "rate_up": 1.9}))).cause == "none"
    harmful = arms(**{"continue": 2.6, "rate_up": 2.3})
    assert measure_or_conclude_midway(replace(slow, arms=harmful)).cause == "none", "less harm is no gain"


def test_a_small_rank_that_can_express_little_is_raised():
    # a tangent part of 0.5 of 3.2 in all
    small = replace(HEALTHY, candidate="rank", is_small=True, signals=signals(unadapted=1.7))
    found = measure_or_conclude_midway(small)
    assert (found.cause, found.proven, found.arm) == ("rank", True, "")
    assert measure_or_conclude_midway(replace(small, is_small=False)).cause == "none"
    assert measure_or_conclude_midway(replace(small, progress=0.04)).cause == "none"
    assert measure_or_conclude_midway(replace(small, signals=signals(unadapted=1.7, agreement=0.01))).cause == "none"


def test_data_targets_and_too_few_rows_come_first():
    assert measure_or_conclude_midway(replace(HEALTHY, train_loss=1.0)).cause == "data: overfitting"
    assert measure_or_conclude_midway(replace(HEALTHY, mask_findings=("end-token: masked",))).cause.startswith("data")
    few = replace(quality("lagging"), loss=Interval(2.0, 1.0, 3.0, 3))
    assert "3 held-out documents" in measure_or_conclude_midway(replace(HEALTHY, quality=few, signals=None)).said
    reached = replace(quality("lagging"), target=2.5)
    assert "target" in measure_or_conclude_midway(replace(HEALTHY, quality=reached, signals=None)).said
