"""The order of suspicion: what is measured next, or which cause the evidence names. Pure.

Not lagging; data and masks; unstable; steps; learning rate; target modules; rank; embeddings or head.
Signals alone cannot tell rank from learning rate, so that both are tried: an action is named only where its
fork beats that of going on as before and that of another rate, beyond paired noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peftkit.diagnose.quality import Quality
from peftkit.diagnose.signals import Signals
from peftkit.diagnose.statistics import Interval, Rows, gain

Cause = Literal[
    "none",
    "learning rate too high",
    "learning rate too low",
    "too few steps",
    "data: overfitting",
    "data: labels or masks broken",
    "target modules",
    "rank",
    "embeddings or head",
    "unstable",
    "undecided",
]
Wanted = Literal["signals", "dependence", "continue", "rate up", "rate down", "candidate"]
CAPACITY: tuple[Cause, ...] = ("target modules", "rank", "embeddings or head")
RATE_FACTOR = 3.0
BEYOND = 2.5  # paired standard errors that a fork must be better by
MATTERS = 0.004  # of the loss: less is not worth a change, however certain
GENERALISES = 0.3  # below it what is left to learn does not help held-out rows
AGREES = 0.05  # below it two batches want nothing in common
DEPENDS = 0.01  # of the loss: what an answer's own question brings at least, where labels are right
MISSING = 0.8  # of the gradients' energy in layers without an adapter: the rest is not what a run lacks
LEARNT = 0.5  # of the loss at the start: below it answers are known in shape, if not by their questions
BY_HEART = 0.5  # of the held-out loss: a training loss below it


@dataclass(frozen=True)
class Arm:
    """A fork and what it came to on the rows to decide by; no rows where its loss was not finite."""

    name: Wanted
    learning_rate: float
    num_steps: int
    train_loss: float
    rows: Rows | None


@dataclass(frozen=True)
class Evidence:
    """All that is known so far. `rows` are those to decide by, in the state that is judged.

    `masks` are findings of the data gate that were waived and say that the wrong tokens are learnt.
    `candidate` is the cause that the fork of that name would confirm, "" where nothing can be grown.
    `unaffordable` are measurements for which the budget has no room.
    """

    quality: Quality
    rows: Rows
    masks: tuple[str, ...] = ()
    num_departures: int = 0  # rollbacks, skipped steps
    train_loss: float | None = None
    start_loss: float | None = None  # of held-out rows, before the first step
    signals: Signals | None = None
    dependence: Interval | None = None
    asks: bool = True  # whether answers have a question to depend on
    candidate: Cause | Literal[""] = ""
    is_small: bool = False  # an adapter of a rank below any usual one
    arms: Mapping[str, Arm] = field(default_factory=dict)
    unaffordable: frozenset[str] = frozenset()

    def _rows(self, name: str) -> Rows | None:
        """Of an arm, or of the state itself, which has no name."""
        arm = self.arms.get(name)
        return self.rows if not name else (arm.rows if arm else None)

    def versus(self, better: str, worse: str = "") -> Interval | None:
        """The paired gain of an arm over another, or over the state itself."""
        first, second = self._rows(better), self._rows(worse)
        return None if first is None or second is None else gain(second, first)

    def beats(self, better: str, worse: str = "") -> bool:
        """Whether an arm, or the state, is better beyond paired noise, by what matters."""
        found = self.versus(better, worse)
        if found is None:  # one that left the road is beaten by any that did not
            return self._rows(better) is not None and worse in self.arms
        certain = found.is_enough and found.mean > BEYOND * found.error
        return certain and found.mean > MATTERS * self.rows.mean


@dataclass(frozen=True)
class Finding:
    """The cause with why, in words, and which arm shows what acting on it brings.

    It is `proven` where that arm beat all controls beyond paired noise: only then a run acts by itself.
    """

    cause: Cause
    said: str
    arm: str = ""
    proven: bool = False


def look_further(evidence: Evidence) -> Wanted | Finding:
    """What to measure next, or the cause."""
    e = evidence
    if found := _at_once(e):
        return found
    if e.signals is None and "signals" not in e.unaffordable:
        return "signals"
    if e.asks and e.dependence is None and "dependence" not in e.unaffordable:
        return "dependence"
    if found := _data(e):
        return found
    for arm in _arms(e):
        if arm not in e.arms and arm not in e.unaffordable:
            return arm
    return _by_forks(e)


def _at_once(e: Evidence) -> Finding | None:
    """What the evaluations, the events and the data gate have said already."""
    if e.masks:
        return Finding("data: labels or masks broken", "; ".join(e.masks))
    if e.quality.state == "not lagging":
        return Finding("none", e.quality.said)
    if e.num_departures:
        return Finding("unstable", f"{e.num_departures} steps were skipped or taken back")
    if e.quality.state == "still improving":
        return Finding("too few steps" if e.quality.projected else "none", e.quality.said)
    return None


def look_early(evidence: Evidence) -> Wanted | Finding:
    """The first look at a run that may still grow at no cost: are layers without an adapter what it lacks?"""
    e = evidence
    if e.masks:
        return Finding("data: labels or masks broken", "; ".join(e.masks))
    if e.signals is None and "signals" not in e.unaffordable:
        return "signals"
    if e.signals is None:
        return Finding("none", "the budget does not reach to signals this early")
    if e.candidate != "target modules":
        return Finding("none", "no adapter on more layers is in reach, or asked for by the gradients")
    wanted: tuple[Wanted, ...] = ("continue", "rate up", "candidate")
    for arm in wanted:
        if arm not in e.arms and arm not in e.unaffordable:
            return arm
    if e.candidate and _growing_pays(e):
        said = f"the grown adapter is better than going on by {e.versus('candidate', 'continue')}"
        return Finding("target modules", said, "candidate", proven=_is_proven(e))
    if e.unaffordable:
        return Finding("undecided", f"the budget did not reach to: {', '.join(sorted(e.unaffordable))}")
    return Finding("none", "growing was not better than going on, or than another rate")


def _arms(e: Evidence) -> tuple[Wanted, ...]:
    """In the order in which they tell most. A third of the rate only where going on does harm."""
    if e.candidate == "embeddings or head":
        return ("continue", "rate up", "candidate")
    harmed = e.beats("", "continue")
    return (
        "continue",
        "rate up",
        *(("candidate",) if e.candidate else ()),
        *(("rate down",) if harmed else ()),
    )


def _data(e: Evidence) -> Finding | None:
    """Labels that have nothing to do with their questions, and rows that are known by heart."""
    signals = e.signals
    if signals is not None and signals.is_collapsed:
        said = (
            f"the layers' gradients are {signals.reach:.0e} of the head's: a rate that was too high has left "
            "them where nothing moves the loss"
        )
        return Finding("learning rate too high", said)
    if e.asks and e.dependence is not None and signals is not None:
        depends = e.dependence.low > 0 or e.dependence.high > DEPENDS * e.rows.mean
        said = f"the answers are as likely under other rows' questions (by {e.dependence} nats)"
        if not depends and signals.agreement < AGREES:
            more = f"two batches want nothing in common (agreement {signals.agreement:.3f})"
            return Finding("data: labels or masks broken", f"{said}, and {more}")
        if not depends and e.start_loss is not None and e.rows.mean < LEARNT * e.start_loss:
            more = f"much was learnt all the same: from {e.start_loss:.3f} to {e.rows.mean:.3f}"
            return Finding("data: labels or masks broken", f"{said}, and {more}")
    worsened = e.quality.worsened
    if worsened is not None and worsened.mean > MATTERS * e.rows.mean:
        said = f"the loss on held-out rows has risen since its best by {worsened}"
        if e.train_loss is not None and e.train_loss < e.rows.mean:
            return Finding("data: overfitting", f"{said}, and that of training is {e.train_loss:.3f}")
    return _by_heart(e)


def _by_heart(e: Evidence) -> Finding | None:
    """Rows of training that are known while held-out rows are not."""
    if e.train_loss is None or e.train_loss >= BY_HEART * e.rows.mean:
        return None
    said = f"the loss of training is {e.train_loss:.3f}, that of held-out rows {e.rows.mean:.3f}"
    signals = e.signals
    if signals is not None and signals.generalises < GENERALISES:
        helps = f"{signals.generalises:.2f} of what training still wants helps held-out rows"
        return Finding("data: overfitting", f"{said}, and {helps}")
    return Finding("data: overfitting", said) if e.train_loss < BY_HEART**2 * e.rows.mean else None


def _by_forks(e: Evidence) -> Finding:
    """The cause that forks show; undecided where the budget left out what would tell."""
    still = e.quality.projected
    learns = still is not None and still.low > 0 and still.mean > MATTERS * e.rows.mean
    if e.candidate and _growing_pays(e):
        said = f"the grown adapter is better than going on by {e.versus('candidate', 'continue')}"
        return Finding(e.candidate, said, "candidate", proven=_is_proven(e))
    if _layers_are_missing(e):
        assert e.signals is not None
        said = f"{e.signals.share_unadapted:.0%} of the gradients' energy lies in layers without an adapter"
        shown = (
            "the fork was too short to show it" if "candidate" in e.arms else "the budget had no fork for it"
        )
        return Finding("target modules", f"{said}; {shown}")
    higher = e.versus("rate up", "continue")
    bears_more = learns and not e.beats("continue", "rate up")
    if higher is not None and (e.beats("rate up", "continue") or bears_more):
        said = f"{RATE_FACTOR:g} times the rate goes as well as this one, or better: {higher}"
        return Finding("learning rate too low", f"{said}; {_learning(still)}", "rate up")
    if e.beats("rate down", "continue") and e.beats("rate down"):
        said = f"a third of the rate is better than going on by {e.versus('rate down', 'continue')}"
        return Finding("learning rate too high", said, "rate down")
    missing = [arm for arm in _arms(e) if arm not in e.arms]
    if learns or e.beats("continue"):
        untold = f"; the budget left out: {', '.join(missing)}" if missing else ""
        arm = "continue" if e.beats("continue") else ""
        return Finding("too few steps", _learning(still) + untold, arm)
    if missing:
        return Finding("undecided", f"the budget did not reach to: {', '.join(missing)}")
    return Finding("undecided", "nothing that was tried is better than what there is, beyond its noise")


def _growing_pays(e: Evidence) -> bool:
    """Whether the candidate is better than going on and than a higher rate, and no worse than before.

    Of an adapter that is smaller than any usual one the fork only has to go the right way.
    """
    gained, over = e.versus("candidate"), e.versus("candidate", "continue")
    if "rate up" not in e.arms or gained is None or over is None or gained.mean <= 0:
        return False
    higher = e.versus("candidate", "rate up")
    least = higher.error if higher is not None and e.beats("rate up", "continue") else 0.0
    if not over.is_enough or (higher is not None and higher.mean <= least):
        return False
    expected = e.candidate == "target modules" or e.is_small
    return e.beats("candidate", "continue") or (expected and over.mean > over.error)


def _is_proven(e: Evidence) -> bool:
    return all(e.beats("candidate", other) for other in ("continue", "rate up"))


def _layers_are_missing(e: Evidence) -> bool:
    """Whether nearly all that the gradients want lies in layers without an adapter, and no higher rate helps.

    A short fork is noisier than this signal.
    """
    untried = "rate up" not in e.arms and "rate up" not in e.unaffordable
    if e.candidate != "target modules" or e.signals is None or untried:
        return False
    return e.signals.share_unadapted > MISSING and not e.beats("rate up", "continue")


def _learning(projected: Interval | None) -> str:
    return f"half as many steps again would bring about {projected}" if projected else "going on brings more"
