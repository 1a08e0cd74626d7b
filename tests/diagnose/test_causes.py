"""The order of suspicion, on evidence made up: what is asked for next, and what is said."""

from dataclasses import replace

import numpy as np
import pytest

from peftkit.diagnose.causes import Arm, Diagnosis, Evidence, measure_or_conclude
from peftkit.diagnose.positions import Stretch
from peftkit.diagnose.quality import Quality
from peftkit.diagnose.signals import ModuleSignal, Signals
from peftkit.diagnose.statistics import HeldOutLosses, Interval

HARD = np.random.default_rng(0).gamma(4.0, 0.25, size=100)
LEARNS, STILL = Interval(0.3, 0.25, 0.35, 100), Interval(0.001, -0.01, 0.01, 100)


def rows(loss):
    chance = np.random.default_rng(int(1000 * loss))
    sums = HARD + loss - HARD.mean() + chance.normal(0, 0.02, size=100)
    return HeldOutLosses(tuple(sums), (1,) * 100, tuple(range(100)))


def quality(state="lagging", projected=STILL, worsened=None):
    return Quality(state, Interval(2.0, 1.9, 2.1, 100), 1.0, 0.02, projected, worsened, "as planted")


def signals(*, across=1.0, agreement=0.3, unadapted=0.0, size=1.0):
    adapted = ModuleSignal("a.q", "q", True, 64, 0.5, 1.0, across, agreement, size)
    other = ModuleSignal("a.up", "up", False, 64, 0.0, unadapted, across * unadapted, agreement, size)
    return Signals((adapted, other), head_size=1.0, num_rows=48)


def arm(name, loss):
    return Arm(name, 1e-3, 8, 1.0, rows(loss) if loss is not None else None)


def evidence(**more):
    made = Evidence(quality(), rows(2.0), signals=signals(), dependence=Interval(1.0, 0.8, 1.2, 100))
    return replace(made, **more)


def arms(**losses):
    return {name.replace("_", " "): arm(name.replace("_", " "), loss) for name, loss in losses.items()}


def cause(**more):
    found = measure_or_conclude(evidence(**more))
    assert isinstance(found, Diagnosis), found
    return found.cause


def test_a_healthy_run_is_asked_for_nothing():
    for state, trend, said in (
        ("not lagging", LEARNS, "none"),
        ("still improving", LEARNS, "too few steps"),
        ("still improving", None, "none"),
    ):
        assert cause(quality=quality(state, trend), signals=None, dependence=None) == said


def test_data_and_masks_come_before_everything():
    broken = "data: labels or masks broken"
    assert cause(mask_findings=("end-token: never learnt",), quality=quality("not lagging")) == broken
    assert cause(num_divergences=2) == "unstable"
    assert cause(dependence=STILL, signals=signals(agreement=0.01)) == broken
    assert cause(dependence=STILL, start_loss=6.0) == broken, "a shape was learnt, and no mapping"
    worse = Interval(0.5, 0.4, 0.6, 100)
    assert cause(quality=quality(worsened=worse), train_loss=0.1) == "data: overfitting"
    assert cause(train_loss=0.9, signals=signals(across=0.1)) == "data: overfitting"
    assert cause(train_loss=0.4) == "data: overfitting", "known by heart, and nothing held out is"


def test_a_collapse_is_a_rate_too_high_and_no_broken_label():
    gone = signals(agreement=-0.1, across=0.0, size=1e-6)
    assert cause(signals=gone, dependence=STILL) == "learning rate too high"


def asked(given):
    """What is measured, in order, where forks come to the losses that are given."""
    wants, now = [], evidence(signals=None, dependence=None, candidate="rank")
    first = {"signals": {"signals": signals()}, "dependence": {"dependence": Interval(1.0, 0.8, 1.2, 100)}}
    while isinstance(wanted := measure_or_conclude(now), str):
        wants.append(wanted)
        fields = first.get(wanted) or {"arms": {**now.arms, wanted: arm(wanted, given.get(wanted, 1.95))}}
        now = replace(now, **fields)
    return wants


def test_what_is_measured_next_goes_from_cheap_to_dear():
    assert asked({}) == ["signals", "dependence", "continue", "rate up", "candidate"]
    harmed = ["signals", "dependence", "continue", "rate up", "candidate", "rate down"]
    assert asked({"continue": 2.5}) == harmed, "a smaller rate is tried where going on does harm"


@pytest.mark.parametrize(
    ("losses", "candidate", "projected", "expected"),
    [
        ({"continue": 1.9, "rate_up": 1.5}, "", LEARNS, "learning rate too low"),
        ({"continue": 1.9, "rate_up": 1.9}, "", LEARNS, "learning rate too low"),
        ({"continue": 1.9, "rate_up": 1.9}, "", STILL, "too few steps"),
        ({"continue": 2.4, "rate_up": None, "rate_down": 1.7}, "", STILL, "learning rate too high"),
        ({"continue": 2.0, "rate_up": 2.2}, "", LEARNS, "too few steps"),
        ({"continue": 1.95, "rate_up": 2.2, "candidate": 1.5}, "rank", LEARNS, "rank"),
        ({"continue": 1.95, "rate_up": 1.4, "candidate": 1.5}, "rank", LEARNS, "learning rate too low"),
        ({"continue": 2.3, "rate_up": 2.4, "rate_down": 2.1, "candidate": 2.05}, "rank", LEARNS, "too few steps"),
        ({"continue": 2.0, "rate_up": 2.2, "candidate": 2.0}, "rank", STILL, "undecided"),
    ],
)
def test_forks_tell_the_cause(losses, candidate, projected, expected):
    assert cause(arms=arms(**losses), candidate=candidate, quality=quality(projected=projected)) == expected


def test_layers_that_hold_all_the_energy_need_no_fork_and_a_small_rank_a_weaker_one():
    forks = arms(**{"continue": 2.0, "rate_up": 2.2, "candidate": 2.05})
    assert cause(arms=forks, candidate="target modules", quality=quality(projected=LEARNS)) == "too few steps"
    missing = {"signals": signals(unadapted=20.0), "candidate": "target modules"}
    assert cause(arms=forks, **missing, quality=quality(projected=LEARNS)) == "target modules"
    helped = arms(**{"continue": 2.0, "rate_up": 1.8, "candidate": 2.05})
    assert cause(arms=helped, **missing, quality=quality(projected=LEARNS)) == "learning rate too low"
    weak = arms(**{"continue": 2.0, "rate_up": 2.2, "candidate": 1.996})
    small = {"arms": weak, "candidate": "rank", "quality": quality(projected=LEARNS)}
    assert cause(**small) == "too few steps"
    found = measure_or_conclude(evidence(**small, is_small=True))
    assert (found.cause, found.proven) == ("rank", False), "advice, on which no run acts by itself"
    strong = arms(**{"continue": 2.0, "rate_up": 2.2, "candidate": 1.5})
    assert measure_or_conclude(evidence(**{**small, "arms": strong})).proven


def test_a_small_rank_that_expresses_little_is_the_cause_whatever_short_forks_say():
    def found(tangent, agreement=0.3, **more):
        module = ModuleSignal("a.q", "q", True, 64, tangent, 1.0, 1.0, agreement)
        forks = arms(**{"continue": 1.95, "rate_up": 1.4, "candidate": 1.97})
        given = {"arms": forks, "candidate": "rank", "quality": quality(projected=LEARNS), **more}
        return cause(**given, signals=Signals((module,), head_size=1.0, num_rows=48))

    assert found(0.05, is_small=True) == "rank"
    assert found(0.05) == "learning rate too low", "a usual rank needs a fork that pays"
    assert found(0.3, is_small=True) == "learning rate too low"
    assert found(0.05, is_small=True, agreement=0.01) != "rank", "noise has no share"


def test_what_the_budget_leaves_out_is_told():
    left_out = frozenset({"rate up", "candidate"})
    some = {"arms": arms(**{"continue": 2.0}), "unaffordable": left_out}
    found = measure_or_conclude(evidence(**some))
    assert found.cause == "undecided"
    assert "rate up" in found.said
    found = measure_or_conclude(evidence(**some, quality=quality(projected=LEARNS)))
    assert found.cause == "too few steps"
    assert "not measured for lack of budget: rate up" in found.said


def test_few_documents_decide_nothing():
    few = replace(evidence().quality, loss=Interval(0.05, 0.01, 0.09, 3))
    diagnosis = measure_or_conclude(replace(evidence(), quality=few))
    assert diagnosis.cause == "undecided"
    assert "3 held-out documents" in diagnosis.said


def test_positions_that_the_base_was_not_trained_to_are_stretched_where_that_gains():
    long = evidence(has_long_rows=True)
    assert measure_or_conclude(long) == "positions"
    losses = ((0, 64, 3.0, 3.1), (64, 128, 4.0, 3.1))
    better = Stretch(64, 128, 2, Interval(0.4, 0.3, 0.5, 50), losses)
    found = measure_or_conclude(replace(long, stretch=better))
    assert (found.cause, found.proven) == ("positions", False)
    assert "from 3.000 to 4.000 from position 64 on" in found.said
    noise = replace(better, gain=Interval(0.01, -0.3, 0.5, 50))
    assert measure_or_conclude(replace(long, stretch=noise)) == measure_or_conclude(evidence())
    assert measure_or_conclude(replace(long, stretch=Stretch())) == measure_or_conclude(evidence())
    assert measure_or_conclude(long.without("positions")) == measure_or_conclude(evidence())


def test_noise_does_not_make_a_higher_rate_welcome():
    """Worse by a tenth of the loss, though not beyond noise: the run wants steps, not a rate."""
    rng = np.random.default_rng(1)
    going_on = rows(2.0)
    worse = HeldOutLosses(
        tuple(np.asarray(rows(2.2).sums) + rng.normal(0, 3, 100)), going_on.counts, going_on.documents
    )
    shift = 0.2 - (worse.mean - going_on.mean)
    worse = replace(worse, sums=tuple(np.asarray(worse.sums) + shift))
    forks = {"continue": arm("continue", 2.0), "rate up": replace(arm("rate up", 2.0), rows=worse)}
    learning = evidence(quality=quality(projected=LEARNS), arms=forks)
    assert not learning.beats("continue", "rate up")
    assert measure_or_conclude(learning).cause == "too few steps"
    as_good = {
        **forks,
        "rate up": replace(arm("rate up", 2.0), rows=replace(worse, sums=tuple(np.asarray(worse.sums) - 0.19))),
    }
    assert measure_or_conclude(replace(learning, arms=as_good)).cause == "learning rate too low"
