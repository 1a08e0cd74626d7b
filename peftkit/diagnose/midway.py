"""The order of suspicion at a look in mid-run, while the cause can still be acted on. Pure.

A rate that is too high, layers without an adapter, data, a small rank, a rate that is too low. A look costs gradient
signals; forks are made where these, or the size of the update so far, give a reason to.
"""

from __future__ import annotations

from peftkit.diagnose.causes import (
    MIN_AGREEMENT,
    MIN_EXPRESSIBLE_SHARE,
    Diagnosis,
    Evidence,
    Measurement,
    few_documents,
    growing_pays,
    is_proven,
)

# |s B A| / |W| over the share of the steps made (docs/diagnosis.md)
MAX_UPDATE_PACE = 10.0
MIN_UPDATE_PACE = 0.65
MIN_RATE_PROGRESS = 0.1  # of the steps: earlier, three times the rate wins in forks of healthy runs, too
MIN_GAP_SHARE = 0.35  # of the held-out loss, that the training loss is below it


def measure_or_conclude_midway(evidence: Evidence) -> Measurement | Diagnosis:
    """Return the next measurement, or the diagnosis of a run that goes on."""
    e = evidence
    target = e.quality.target
    if e.mask_findings:
        return Diagnosis("data: labels or masks broken", "; ".join(e.mask_findings))
    if not e.quality.loss.has_enough_documents:
        return Diagnosis("undecided", few_documents(e.quality.loss.num_documents))
    if target is not None and e.rows.mean <= target:
        return Diagnosis("none", f"the loss, {e.rows.mean:.4f}, is below the target already")
    pace = e.update_pace
    if pace is not None and pace > MAX_UPDATE_PACE:
        for arm in ("continue", "start over"):
            if not _is_settled(e, arm):
                return arm
        if e.beats("start over") and e.beats("start over", "continue"):
            reason = f"a new adapter at a lower rate is better after {e.arms['start over'].num_steps} small steps"
            reason += f", by {e.gain_over('start over')}"
            return Diagnosis("learning rate too high", reason, "start over", proven=True)
    if not _is_settled(e, "signals"):
        return "signals"
    may_lack_layers = e.candidate == "target modules"
    may_lack_rate = pace is not None and pace < MIN_UPDATE_PACE and e.progress >= MIN_RATE_PROGRESS
    forks: list[Measurement] = ["continue", "rate up"] if may_lack_layers or may_lack_rate else []
    forks += ["candidate"] if may_lack_layers else []
    if waiting := [arm for arm in forks if not _is_settled(e, arm)]:
        return waiting[0]
    return _conclude(e, may_lack_rate=may_lack_rate)


def _is_settled(e: Evidence, measurement: Measurement) -> bool:
    """Return whether something was measured, or cannot be."""
    is_measured = e.signals is not None if measurement == "signals" else measurement in e.arms
    return is_measured or measurement in e.unaffordable


def _conclude(e: Evidence, *, may_lack_rate: bool) -> Diagnosis:
    """Return the diagnosis, once what is asked for is measured."""
    if e.candidate == "target modules" and growing_pays(e):
        reason = f"the grown adapter is better than going on by {e.gain_over('candidate', 'continue')}"
        return Diagnosis("target modules", reason, "candidate", proven=is_proven(e))
    held_out, is_late = e.rows.mean, e.progress >= MIN_RATE_PROGRESS
    if is_late and e.train_loss is not None and e.train_loss < (1 - MIN_GAP_SHARE) * held_out:
        reason = f"the training loss is {e.train_loss:.3f}, the held-out loss {held_out:.3f}"
        return Diagnosis("data: overfitting", reason)
    signals = e.signals
    if signals is not None and is_late and e.candidate == "rank" and e.is_small:
        share = signals.share_expressible
        if signals.agreement >= MIN_AGREEMENT and share < MIN_EXPRESSIBLE_SHARE:
            reason = f"an adapter of this rank can express no more than {share:.0%} of the gradients' energy"
            return Diagnosis("rank", reason, proven=True)  # a fork of some steps cannot tell: the next look does
    own_gain = e.gain_over("rate up")
    if may_lack_rate and e.beats("rate up", "continue") and own_gain is not None and own_gain.mean > 0:
        factor = e.arms["rate up"].learning_rate / e.arms["continue"].learning_rate
        gain = e.gain_over("rate up", "continue")
        reason = f"{factor:.2g} times the learning rate is better than going on by {gain or own_gain}"
        return Diagnosis("learning rate too low", reason, "rate up", proven=True)
    if e.unaffordable:
        return Diagnosis("undecided", f"the diagnosis budget was too small for: {', '.join(sorted(e.unaffordable))}")
    return Diagnosis("none", "neither more layers, nor a larger rank, nor another learning rate is asked for")
