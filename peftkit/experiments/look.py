"""Diagnosis of quality: is it lagging, why, and what to do; at the looks of a run and at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.diagnose.causes import CAPACITY, Diagnosis, Evidence, Measurement, measure_or_conclude
from peftkit.diagnose.midway import measure_or_conclude_midway
from peftkit.diagnose.statistics import mean_interval, paired_gain
from peftkit.diagnose.verdict import Action, Verdict
from peftkit.errors import Interrupted
from peftkit.experiments.action import MORE_STEPS, choose_action
from peftkit.experiments.evidence import clipped_share, read_evaluations, standing_events
from peftkit.experiments.experiment import Experiment
from peftkit.experiments.forks import ForkStart
from peftkit.experiments.growth import add_growth, take_back_growth, write_growth
from peftkit.experiments.next_recipe import write_next_recipe
from peftkit.model.adapter.attach import trainable_tensors
from peftkit.model.hardware import is_out_of_memory
from peftkit.objectives import OBJECTIVES
from peftkit.plan import Plan, read_plan
from peftkit.plan.plan import Growth
from peftkit.plan.rate import with_found_rate
from peftkit.prepare.context import RunContext
from peftkit.rundir import step_of
from peftkit.rundir.events import (
    Event,
    GrowthEvent,
    GrowthKeptEvent,
    GrowthTakenBackEvent,
    RateFoundEvent,
    RollbackEvent,
    SpikeEvent,
    VerdictEvent,
    WarningEvent,
    last_of,
    of_type,
)
from peftkit.secrets import REDACTED
from peftkit.train.checkpoint.restore import load_trained
from peftkit.train.training import compute_row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LookOutcome:
    """The outcome of a look: a verdict, the plan to continue with, and the model as it is wrapped now.

    There is no verdict where another rank looked.
    """

    verdict: Verdict | None
    plan: Plan
    model: Any
    wrapped_plan: Plan  # by which its adapter was attached
    is_rewrapped: bool


def is_look_due(context: RunContext, step: int, *, at_end: bool) -> bool:
    """Return whether a look is due at a step and was not done yet."""
    diagnosis = context.plan.diagnose
    if diagnosis.escalate == "off" or not (at_end or step in diagnosis.look_steps):
        return False
    if not at_end and any(step in {growth.step, growth.undone_step} for growth in context.plan.growths):
        return False  # killed between the growth, or its being undone, and the verdict
    verdict = last_of(context.run.events(), VerdictEvent, step=step)
    return verdict is None or (at_end and verdict.kept is False)  # that only undid a change: the run went on anew


def try_look(context: RunContext, training: Any, *, step: int, at_end: bool) -> LookOutcome:
    """Run a look; on an error emit a warning and an undecided verdict, so that the run continues."""
    try:
        return run_look(context, training, step=step, at_end=at_end)
    except (Interrupted, OSError):
        raise
    except Exception as error:  # noqa: BLE001  libraries raise what they like; what was trained is whole
        message = f"the diagnosis failed ({type(error).__name__}: {error}): please report it"
        context.emit(WarningEvent(text=f"{message}; the run continues; peftkit diagnose tries again"))
    context = replace(context, plan=read_plan(context.run))  # it may have grown before that
    quality = start_experiment(context, training.trainer.model, None, step, at_end=at_end).judge_quality()
    action = Action("nothing")
    verdict = Verdict(step, quality.state, "undecided", message, action, quality.loss, quality.loss.num_documents)
    publish_verdict(context, verdict)
    # the model may be anything now: it is loaded anew, unless it was never touched
    return LookOutcome(verdict, context.plan, None, context.plan, is_rewrapped=context.plan.method.peft is not None)


def run_look(context: RunContext, training: Any, *, step: int, at_end: bool) -> LookOutcome:
    """Judge a run at a step that has a checkpoint, publish the verdict, and in `auto` act on it."""
    checkpoint, _ = context.run.newest_checkpoint()
    experiment = start_experiment(context, training.trainer.model, checkpoint, step, at_end=at_end)
    if outcome := _take_back_failed_growth(context, experiment):
        return outcome
    verdict, finding = reach_verdict(experiment, measure_or_conclude if at_end else measure_or_conclude_midway)
    plan = context.plan
    may_act = plan.diagnose.escalate == "auto" and len(plan.growths) < plan.diagnose.max_escalations
    if may_act and finding.proven and checkpoint is not None and step_of(checkpoint) == step:
        plan = _change_run(experiment, finding, verdict, checkpoint)
        verdict = replace(verdict, kept=True)
    publish_verdict(context, verdict)
    return LookOutcome(verdict, plan, experiment.model, experiment.wrapped_plan, experiment.is_rewrapped)


def _change_run(experiment: Experiment, finding: Diagnosis, verdict: Verdict, checkpoint: Path) -> Plan:
    """Change the run in place as the finding asks for, and return the plan by which it goes on."""
    context, step, at_end = experiment.context, experiment.step, experiment.at_end
    plan = context.plan
    if finding.cause in CAPACITY:
        if experiment.grown is None:
            experiment.attach_candidate()
        assert (
            experiment.candidate is not None and experiment.candidate.plan is not None and experiment.grown is not None
        )
        new_plan, tensors = experiment.candidate.plan, experiment.grown.trained
        optimizer = {} if at_end else experiment.grown.optimizer
        if at_end:
            extra_steps = max(1, round(MORE_STEPS * (plan.train.num_steps or 0)))
            train = replace(new_plan.train, num_steps=step + extra_steps, restart_step=step)
            new_plan = replace(new_plan, train=train)
    else:
        new_plan = with_found_rate(plan, experiment.rates[finding.arm], finding.said)
        new_plan = replace(new_plan, train=replace(new_plan.train, restart_step=step))
        is_new = finding.arm == "start over"
        start = ForkStart(experiment.new_start, {}) if is_new else experiment.start
        tensors, optimizer = start.trained, dict(start.optimizer)
    assert experiment.state_rows is not None
    growth = Growth(
        step,
        finding.cause,
        verdict.action.overrides,
        rows=tuple(experiment.deciding),
        row_losses=experiment.state_rows.sums,
        overhead=verdict.overhead,
    )
    new_plan = add_growth(new_plan, growth)
    write_growth(context.run, plan, new_plan, checkpoint=checkpoint, trained=tensors, optimizer=optimizer)
    context.emit(
        GrowthEvent(
            step=step,
            cause=finding.cause,
            overrides=list(growth.overrides),
            num_trainable=new_plan.method.num_trainable,
            learning_rate=new_plan.train.learning_rate,
            num_steps=new_plan.train.num_steps,
        )
    )
    return new_plan


def start_experiment(
    context: RunContext, model: PreTrainedModel, checkpoint: Path | None, step: int, *, at_end: bool = True
) -> Experiment:
    """Start an experiment on a run's newest checkpoint, or on the model as it is where there is none."""
    if context.plan.method.peft is None:
        start = ForkStart(trainable_tensors(model), {})  # a copy would be a second model
    elif checkpoint is not None and step_of(checkpoint) == step:
        start = ForkStart.of(checkpoint)
    else:
        start = ForkStart({n: t.detach().clone() for n, t in trainable_tensors(model).items()}, {})
    all_events, held_out = context.run.events(), context.prepared.eval
    events = standing_events(all_events, context.plan)
    evaluations, train_loss = read_evaluations(all_events, held_out, step, task=context.plan.base.task)
    if (
        context.plan.train.label_smoothing
    ):  # steps report the smoothed loss, whose floor would hide what is known by heart
        rows = context.prepared.train[: len(held_out)]
        train_loss = compute_row_losses(model, rows, context.plan, pad_id=context.tokenizer.pad_token_id).mean
    share_clipped = clipped_share(events, context.plan.train.max_grad_norm)
    num_divergences = len(of_type(events, RollbackEvent))
    num_divergences += sum(spike.skipped for spike in of_type(events, SpikeEvent))
    return Experiment(
        context,
        model,
        start,
        step,
        evaluations,
        at_end,
        num_divergences,
        train_loss,
        has_questions="dependence on the question" in OBJECTIVES[context.plan.base.task].health_signs,
        clipped_share=share_clipped,
        spent_share=_spent_share(context.plan, all_events, step),
    )


def _spent_share(plan: Plan, events: Sequence[Event], step: int) -> float:
    """Return the share of the run's tokens that the search for the rate and earlier looks took."""
    verdicts = of_type(events, VerdictEvent)
    judged = {verdict.step for verdict in verdicts}
    found = last_of(events, RateFoundEvent)
    killed = sum(growth.overhead for growth in plan.growths if growth.step not in judged)  # before their verdict
    return sum(e.overhead for e in verdicts if e.step < step) + killed + (found.overhead if found else 0.0)


def reach_verdict(
    experiment: Experiment, policy: Callable[[Evidence], Measurement | Diagnosis] = measure_or_conclude
) -> tuple[Verdict, Diagnosis]:
    """Measure until a cause is found, and return the verdict with its action, gain, cost and numbers.

    Afterwards the model holds the state that was judged, unless it was wrapped anew.
    """
    try:
        evidence, finding = experiment.look(policy)
        action = choose_action(experiment, evidence, finding)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        evidence = experiment.initial_evidence()
        finding = Diagnosis("undecided", "there was not enough memory to look for the cause")
        action = Action("nothing; run peftkit diagnose RUN again where more memory is free")
    if not experiment.is_rewrapped:
        load_trained(experiment.model, experiment.start.trained)
    quality = evidence.quality
    signals = evidence.signals
    verdict_numbers: dict[str, Any] = {
        "train_loss": evidence.train_loss,
        "update_pace": evidence.update_pace,
        "target": evidence.quality.target,
        "behind": asdict(experiment.reference_gap) if experiment.reference_gap else None,
        "projected": asdict(evidence.quality.projected) if evidence.quality.projected else None,
        "worsened": asdict(evidence.quality.worsened) if evidence.quality.worsened else None,
        "dependence": asdict(evidence.dependence) if evidence.dependence else None,
        "arms": {
            name: {
                "learning_rate": arm.learning_rate,
                "num_steps": arm.num_steps,
                "loss": arm.rows.mean if arm.rows else None,
                "gain": asdict(paired_gain(evidence.rows, arm.rows)) if arm.rows else None,
            }
            for name, arm in evidence.arms.items()
        },
        "unaffordable": sorted(evidence.unaffordable),
        "refused": experiment.candidate.refusal if experiment.candidate else "",
        "clipped_share": experiment.clipped_share,
        "positions": asdict(evidence.stretch) if evidence.stretch else None,
    }
    if signals is not None:
        verdict_numbers["signals"] = {
            "tangent": signals.tangent,
            "residual": signals.residual,
            "unadapted": signals.unadapted,
            "generalises": signals.generalises,
            "agreement": signals.agreement,
            "reach": signals.reach,
            "by_worth": signals.by_worth(),
            "num_rows": signals.num_rows,
        }
    if experiment.rung is not None:
        verdict_numbers["rung"] = asdict(experiment.rung)
    verdict = Verdict(
        step=experiment.step,
        state=quality.state,
        cause=finding.cause,
        said=finding.said,
        action=action,
        loss=quality.loss if experiment.is_evaluated else mean_interval(evidence.rows),
        num_rows=len(experiment.deciding),
        overhead=experiment.budget.overhead,
        reference_overhead=experiment.reference_overhead,
        numbers=verdict_numbers,
    )
    return verdict, finding


def publish_verdict(context: RunContext, verdict: Verdict) -> None:
    """Emit the verdict, and write the next recipe beside the run where something changes."""
    path, changes = context.run.path / "next-recipe.yaml", verdict.action.overrides
    growth_overrides = [override for growth in context.plan.growths if growth.kept for override in growth.overrides]
    has_secrets = any(REDACTED in source.path for source in context.loaded.recipe.data.sources)
    if changes and not has_secrets:
        write_next_recipe(path, context.loaded, with_overrides(verdict, (*growth_overrides, *changes)))
    else:
        path.unlink(missing_ok=True)  # of an earlier look
    context.emit(
        VerdictEvent(
            step=verdict.step,
            text=verdict.line,
            **{key: value for key, value in verdict.to_json().items() if key != "step"},
        )
    )


def with_overrides(verdict: Verdict, overrides: tuple[str, ...]) -> Verdict:
    """Return the verdict with all overrides since the recipe, those of kept growths included."""
    return replace(verdict, action=replace(verdict.action, overrides=overrides))


def _take_back_failed_growth(context: RunContext, experiment: Experiment) -> LookOutcome | None:
    """Take back the last change of the run where it gained nothing beyond noise; return None where it is kept.

    A change is judged once: at the look after it. One at an early look that leaves the schedule as it is would cost the
    whole run at its end, and stays.
    """
    growth = context.plan.growths[-1] if context.plan.growths else None
    if growth is None or not growth.kept or growth.step >= experiment.step:
        return None
    kept = last_of(context.run.events(), GrowthKeptEvent)
    if kept is not None and kept.step > growth.step:
        return None
    if experiment.at_end and context.plan.train.restart_step != growth.step:
        return None
    earlier = [evaluation for evaluation in experiment.evaluations if 0 < evaluation.step <= growth.step]
    if experiment.at_end:
        later = [evaluation for evaluation in experiment.evaluations if evaluation.step > growth.step]
        if not earlier or not later:
            return None
        before, after = (
            min(evaluations, key=lambda one: one.rows.mean).rows.of(experiment.half) for evaluations in (earlier, later)
        )
    else:
        if not growth.rows:
            return None  # of a run that an earlier version began
        after = experiment.state_losses(growth.rows)
        before = replace(after, sums=growth.row_losses)
    growth_gain = paired_gain(before, after)
    if growth_gain.low > 0:
        context.emit(GrowthKeptEvent(step=experiment.step, gain=growth_gain.json_values))
        return None
    plan = take_back_growth(context.run, context.plan, step=experiment.step)
    context.emit(
        GrowthTakenBackEvent(step=experiment.step, text=f"it gained {growth_gain}", gain=growth_gain.json_values)
    )
    experiment.evaluations = earlier or experiment.evaluations
    quality = experiment.judge_quality()
    message = f"the change at step {growth.step} gained {growth_gain}: it was undone"
    verdict = Verdict(
        experiment.step,
        quality.state,
        "undecided",
        message,
        Action("nothing"),
        quality.loss,
        len(experiment.deciding),
        kept=False,
    )
    publish_verdict(replace(context, plan=plan), verdict)
    return LookOutcome(verdict, plan, experiment.model, context.plan, is_rewrapped=True)
