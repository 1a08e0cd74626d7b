"""The order of suspicion: which measurement comes next, or which cause the evidence names. Pure.

Not lagging; data and masks; unstable; positions; steps; learning rate; target modules; rank; embeddings or head.
Signals alone cannot tell rank from learning rate, so both are tried: an action is named only if its fork beats the
fork that continues unchanged and the one with another rate, beyond paired noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from peftkit.diagnose.positions import Stretch
from peftkit.diagnose.quality import Quality
from peftkit.diagnose.signals import Signals
from peftkit.diagnose.statistics import MIN_DOCUMENTS, HeldOutLosses, Interval, paired_gain

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
    "positions",
    "unstable",
    "undecided",
]
Measurement = Literal[
    "signals", "dependence", "continue", "rate up", "rate down", "candidate", "start over", "positions"
]
CAPACITY: tuple[Cause, ...] = ("target modules", "rank", "embeddings or head")
RATE_FACTOR = 3.0
MAX_RATE_LOSS_SHARE = 0.03  # of the loss: what a higher rate may cost in a fork where the rate is too low
MIN_STANDARD_ERRORS = 2.5  # paired standard errors that a fork must be better by
MIN_GAIN_SHARE = 0.004  # of the loss: less is not worth a change, however certain
MIN_GENERALISATION = 0.3  # below it what is left to learn does not help held-out rows
MIN_AGREEMENT = 0.05  # below it two batches want nothing in common
MIN_EXPRESSIBLE_SHARE = 0.2  # of the gradients' energy, in the tangent space of a small adapter
MIN_DEPENDENCE = 0.01  # of the loss: what an answer's own question brings at least, where labels are right
MIN_UNADAPTED_SHARE = 0.8  # of the gradients' energy in layers without an adapter: the rest is not what a run lacks
LEARNED_LOSS_SHARE = 0.5  # of the loss at the start: below it answers are known in shape, if not by their questions
MEMORISED_LOSS_SHARE = 0.5  # of the held-out loss: a training loss below it


@dataclass(frozen=True)
class Arm:
    """A fork and its result on the deciding rows; `rows` is None if its loss was not finite."""

    name: Measurement
    learning_rate: float
    num_steps: int
    train_loss: float
    rows: HeldOutLosses | None


@dataclass(frozen=True)
class Evidence:
    """All that is measured so far. `rows` are the losses of the deciding rows, in the state that is judged.

    `mask_findings` are waived findings of the data gate that say that the wrong tokens are in the loss.
    `candidate` is the cause that the fork of that name would confirm, "" if nothing can be grown.
    `unaffordable` are measurements that the budget has no room for. `progress` is the share of the run's steps that
    were made; `update_pace` is |s B A| / |W|, the mean over adapted layers, over the share of the steps that made it,
    None where there is none.
    """

    quality: Quality
    rows: HeldOutLosses
    mask_findings: tuple[str, ...] = ()
    num_divergences: int = 0  # rollbacks, skipped steps
    train_loss: float | None = None
    start_loss: float | None = None  # of held-out rows, before the first step
    signals: Signals | None = None
    dependence: Interval | None = None
    has_questions: bool = True  # whether answers have a question to depend on
    candidate: Cause | Literal[""] = ""
    is_small: bool = False  # an adapter of a rank below any usual one
    arms: Mapping[str, Arm] = field(default_factory=dict)
    unaffordable: frozenset[str] = frozenset()
    progress: float = 1.0
    update_pace: float | None = None
    has_long_rows: bool = False  # that may reach beyond the positions that the base was trained to
    stretch: Stretch | None = None

    def without(self, measurement: str) -> Evidence:
        """Return the same, with a measurement that the budget has no room for."""
        return replace(self, unaffordable=self.unaffordable | {measurement})

    def _rows(self, name: str) -> HeldOutLosses | None:
        """Return the losses of an arm, or of the state itself for the empty name."""
        arm = self.arms.get(name)
        return self.rows if not name else (arm.rows if arm else None)

    def gain_over(self, better: str, worse: str = "") -> Interval | None:
        """Return the paired gain of an arm over another, or over the state itself."""
        first, second = self._rows(better), self._rows(worse)
        return None if first is None or second is None else paired_gain(second, first)

    def beats(self, better: str, worse: str = "") -> bool:
        """Return True if an arm, or the state, is better beyond paired noise and by a gain that matters."""
        interval = self.gain_over(better, worse)
        if interval is None:  # one that left the road is beaten by any that did not
            return self._rows(better) is not None and worse in self.arms
        return is_beyond_noise(interval, self.rows.mean)


@dataclass(frozen=True)
class Diagnosis:
    """A cause, its reason in words, and the arm that shows what acting on it gains.

    `proven` is True if that arm beat all controls beyond paired noise: only then a run acts by itself.
    """

    cause: Cause
    said: str
    arm: str = ""
    proven: bool = False


def is_beyond_noise(gain: Interval, loss: float) -> bool:
    """Return True if a gain is beyond paired noise, and large enough a share of the loss to matter."""
    is_certain = gain.has_enough_documents and gain.mean > MIN_STANDARD_ERRORS * gain.error
    return is_certain and gain.mean > MIN_GAIN_SHARE * loss


def few_documents(num: int) -> str:
    """Return why so few held-out documents decide nothing."""
    return f"{num} held-out document{'' if num == 1 else 's'} cannot tell a cause from noise; {MIN_DOCUMENTS} can"


def measure_or_conclude(evidence: Evidence) -> Measurement | Diagnosis:
    """Return the next measurement, or the diagnosis."""
    e = evidence
    if e.mask_findings:
        at_once = Diagnosis("data: labels or masks broken", "; ".join(e.mask_findings))
    elif e.quality.state == "not lagging":
        at_once = Diagnosis("none", e.quality.said)
    elif not e.quality.loss.has_enough_documents:
        at_once = Diagnosis("undecided", few_documents(e.quality.loss.num_documents))
    elif e.num_divergences:
        at_once = Diagnosis("unstable", f"{e.num_divergences} steps were skipped or rolled back")
    elif e.has_long_rows and e.stretch is None and "positions" not in e.unaffordable:
        return "positions"
    elif e.stretch is not None and e.stretch.gain is not None and is_beyond_noise(e.stretch.gain, e.rows.mean):
        at_once = Diagnosis("positions", e.stretch.said)
    elif e.quality.state == "still improving":
        at_once = Diagnosis("too few steps" if e.quality.projected else "none", e.quality.said)
    else:
        at_once = None
    if diagnosis := at_once:
        return diagnosis
    if e.signals is None and "signals" not in e.unaffordable:
        return "signals"
    if e.has_questions and e.dependence is None and "dependence" not in e.unaffordable:
        return "dependence"
    if diagnosis := _data_problem(e):
        return diagnosis
    for arm in _fork_order(e):
        if arm not in e.arms and arm not in e.unaffordable:
            return arm
    return _conclude_from_forks(e)


def _fork_order(e: Evidence) -> tuple[Measurement, ...]:
    """Return the forks in order of information. A third of the rate only if continuing does harm."""
    if e.candidate == "embeddings or head":
        return ("continue", "rate up", "candidate")
    is_harmful = e.beats("", "continue")
    return ("continue", "rate up", *(("candidate",) if e.candidate else ()), *(("rate down",) if is_harmful else ()))


def _data_problem(e: Evidence) -> Diagnosis | None:
    """Diagnose the data: collapsed layers, labels unrelated to their questions, overfitted or memorised rows.

    None if the evidence shows none of these.
    """
    signals = e.signals
    if signals is not None and signals.is_collapsed:
        reason = (
            f"the layers' gradients are {signals.reach:.0e} of the head's: a learning rate that was too high has "
            "left them where no layer changes the loss"
        )
        return Diagnosis("learning rate too high", reason)
    if e.has_questions and e.dependence is not None and signals is not None:
        is_dependent = e.dependence.low > 0 or e.dependence.high > MIN_DEPENDENCE * e.rows.mean
        reason = f"the answers are as likely under other rows' questions (by {e.dependence} nats)"
        if not is_dependent and signals.agreement < MIN_AGREEMENT:
            detail = f"the gradients of two batches do not agree (cosine {signals.agreement:.3f})"
            return Diagnosis("data: labels or masks broken", f"{reason}, and {detail}")
        if not is_dependent and e.start_loss is not None and e.rows.mean < LEARNED_LOSS_SHARE * e.start_loss:
            detail = f"the loss fell all the same: from {e.start_loss:.3f} to {e.rows.mean:.3f}"
            return Diagnosis("data: labels or masks broken", f"{reason}, and {detail}")
    worsened = e.quality.worsened
    if worsened is not None and worsened.mean > MIN_GAIN_SHARE * e.rows.mean:
        reason = f"the held-out loss has risen since its best by {worsened}"
        if e.train_loss is not None and e.train_loss < e.rows.mean:
            return Diagnosis("data: overfitting", f"{reason}, and the training loss is {e.train_loss:.3f}")
    # training rows are known by heart, held-out rows are not
    if e.train_loss is None or e.train_loss >= MEMORISED_LOSS_SHARE * e.rows.mean:
        return None
    reason = f"the training loss is {e.train_loss:.3f}, the held-out loss {e.rows.mean:.3f}"
    if signals is not None and signals.generalises < MIN_GENERALISATION:
        detail = f"{signals.generalises:.2f} of the remaining training gradient also helps held-out rows"
        return Diagnosis("data: overfitting", f"{reason}, and {detail}")
    return Diagnosis("data: overfitting", reason) if e.train_loss < MEMORISED_LOSS_SHARE**2 * e.rows.mean else None


def _conclude_from_forks(e: Evidence) -> Diagnosis:
    """Return the cause that the forks show; undecided if the budget omitted the forks that would tell."""
    projected = e.quality.projected
    still_improves = projected is not None and projected.low > 0 and projected.mean > MIN_GAIN_SHARE * e.rows.mean
    if e.candidate and growing_pays(e):
        reason = f"the grown adapter is better than going on by {e.gain_over('candidate', 'continue')}"
        return Diagnosis(e.candidate, reason, "candidate", proven=is_proven(e))
    signals = e.signals
    if signals is not None and e.candidate == "rank" and e.is_small and signals.agreement >= MIN_AGREEMENT:
        # a few steps cannot tell: a higher rate helps nearly as much, and new rows have hardly begun
        share = f"{signals.share_expressible:.0%} of the gradients' energy"
        if signals.share_expressible < MIN_EXPRESSIBLE_SHARE:
            return Diagnosis("rank", f"an adapter of this rank can express no more than {share}")
    is_untried = "rate up" not in e.arms and "rate up" not in e.unaffordable
    may_lack_layers = e.candidate == "target modules" and not is_untried and not e.beats("rate up", "continue")
    if may_lack_layers and e.signals is not None and e.signals.share_unadapted > MIN_UNADAPTED_SHARE:
        reason = f"{e.signals.share_unadapted:.0%} of the gradients' energy lies in layers without an adapter"
        was_tried = "candidate" in e.arms
        fork_note = "the fork was too short to show it" if was_tried else "the diagnosis budget allowed no fork for it"
        return Diagnosis("target modules", f"{reason}; {fork_note}")
    higher_rate_gain = e.gain_over("rate up", "continue")
    tolerates_higher_rate = (
        still_improves
        and higher_rate_gain is not None
        and higher_rate_gain.mean > -MAX_RATE_LOSS_SHARE * e.rows.mean  # noise alone would tolerate anything
        and not e.beats("continue", "rate up")
    )
    if higher_rate_gain is not None and (e.beats("rate up", "continue") or tolerates_higher_rate):
        reason = f"{RATE_FACTOR:g} times the learning rate does as well as this one, or better: {higher_rate_gain}"
        return Diagnosis("learning rate too low", f"{reason}; {_projection_text(projected)}", "rate up")
    if e.beats("rate down", "continue") and e.beats("rate down"):
        reason = f"a third of the learning rate is better than continuing by {e.gain_over('rate down', 'continue')}"
        return Diagnosis("learning rate too high", reason, "rate down")
    unmeasured = [arm for arm in _fork_order(e) if arm not in e.arms]
    if still_improves or e.beats("continue"):
        omission = f"; not measured for lack of budget: {', '.join(unmeasured)}" if unmeasured else ""
        arm = "continue" if e.beats("continue") else ""
        return Diagnosis("too few steps", _projection_text(projected) + omission, arm)
    if unmeasured:
        return Diagnosis("undecided", f"the diagnosis budget was too small for: {', '.join(unmeasured)}")
    return Diagnosis("undecided", "nothing that was tried beats the current state beyond its noise")


def growing_pays(e: Evidence) -> bool:
    """Return True if the candidate beats continuing and a higher rate, and is no worse than before.

    For an adapter smaller than any usual one the fork only has to point in the right direction.
    """
    own_gain, gain_over_continue = e.gain_over("candidate"), e.gain_over("candidate", "continue")
    if "rate up" not in e.arms or own_gain is None or gain_over_continue is None or own_gain.mean <= 0:
        return False
    gain_over_rate_up = e.gain_over("candidate", "rate up")
    min_gain = gain_over_rate_up.error if gain_over_rate_up is not None and e.beats("rate up", "continue") else 0.0
    if not gain_over_continue.has_enough_documents or (
        gain_over_rate_up is not None and gain_over_rate_up.mean <= min_gain
    ):
        return False
    is_lenient = e.candidate == "target modules" or e.is_small
    return e.beats("candidate", "continue") or (is_lenient and gain_over_continue.mean > gain_over_continue.error)


def is_proven(e: Evidence) -> bool:
    """Return True if the candidate beats continuing and a higher rate, beyond noise."""
    return all(e.beats("candidate", other) for other in ("continue", "rate up"))


def _projection_text(projected: Interval | None) -> str:
    return f"50 % more steps would lower the loss by about {projected}" if projected else "more steps lower it further"
