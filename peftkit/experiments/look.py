"""Is quality lagging, why, and what to do: at the looks of a run, at its end, and of a run that has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.diagnose.causes import CAPACITY, Evidence, Finding, Wanted, look_early, look_further
from peftkit.diagnose.statistics import gain
from peftkit.diagnose.verdict import Action, Verdict
from peftkit.errors import Interrupted
from peftkit.experiments.candidate import next_method
from peftkit.experiments.evidence import clipped_share, evaluations_of
from peftkit.experiments.experiment import Study
from peftkit.experiments.forks import Start
from peftkit.experiments.growth import take_back, with_growth, write_growth
from peftkit.experiments.next_recipe import write_next_recipe
from peftkit.model.hardware import is_out_of_memory
from peftkit.plan import Plan, read_plan
from peftkit.plan.plan import Growth
from peftkit.prepare.context import Stage
from peftkit.rundir import step_of
from peftkit.secrets import MARK
from peftkit.train.checkpoint.restore import load_trained

MORE_STEPS = 0.5  # of the run: what "more steps" recommends, and what a growth at the end goes on for


@dataclass(frozen=True)
class Looked:
    """What a look came to: a verdict, the plan to go on with, and the model as it is wrapped now."""

    verdict: Verdict
    plan: Plan
    model: Any
    wrapped: Plan  # by which plan
    is_rewrapped: bool


def is_due(stage: Stage, step: int, *, ended: bool) -> bool:
    """Whether a run is to be looked at at a step, and was not yet."""
    wanted = stage.plan.diagnose
    if wanted.escalate == "off" or not (ended or step in wanted.look_steps):
        return False
    if not ended and any(growth.step == step for growth in stage.plan.growths):
        return False  # killed between the growth and its verdict
    return not any(e["event"] == "verdict" and e["step"] == step for e in stage.run.events())


def looked_at(stage: Stage, training: Any, *, step: int, ended: bool) -> Looked:
    """A look that never costs the run: what goes wrong in it costs the verdict, and is told."""
    try:
        return look(stage, training, step=step, ended=ended)
    except (Interrupted, OSError):
        raise
    except Exception as error:  # noqa: BLE001  libraries raise what they like; what was trained is whole
        text = f"looking for a cause failed ({type(error).__name__}: {error}): please report it"
        stage.emit("warning", text=f"{text}; the run goes on, and peftkit diagnose looks again")
    stage = replace(stage, plan=read_plan(stage.run))  # it may have grown before that
    quality = study_of(stage, training.trainer.model, None, step).first_quality()
    action = Action("nothing")
    verdict = Verdict(
        step, quality.state, "undecided", text, action, quality.loss, quality.loss.num_documents
    )
    tell(stage, verdict)
    # the model may be anything now: it is loaded anew, unless it was never touched
    return Looked(verdict, stage.plan, None, stage.plan, is_rewrapped=stage.plan.method.peft is not None)


def look(stage: Stage, training: Any, *, step: int, ended: bool) -> Looked:
    """Judge a run at a step of which a checkpoint stands, tell the verdict, and in `auto` act on it."""
    checkpoint, _ = stage.run.newest_checkpoint()
    study = study_of(stage, training.trainer.model, checkpoint, step)
    if ended and (lost := _did_not_pay(stage, study)):
        return lost
    verdict, finding = verdict_of(study, look_further if ended else look_early)
    plan = stage.plan
    acts = stage.plan.diagnose.escalate == "auto" and finding.proven and step_of(checkpoint) == step
    if acts and num_kept(plan) < plan.diagnose.max_escalations:
        plan = _grow(stage, study, finding, checkpoint, ended=ended)
        verdict = replace(verdict, kept=True)
    tell(stage, verdict)
    return Looked(verdict, plan, study.model, study.wrapped, study.is_rewrapped)


def num_kept(plan: Plan) -> int:
    """Growths that the run stands on."""
    return sum(growth.kept for growth in plan.growths)


def study_of(stage: Stage, model: Any, checkpoint: Path | None, step: int) -> Study:
    """A look at a run's newest checkpoint, or at the model as it is where there is none."""
    from peftkit.model.adapter.attach import trainable_tensors

    if stage.plan.method.peft is None:
        start = Start(trainable_tensors(model), {})  # a copy would be a second model
    elif checkpoint is not None and step_of(checkpoint) == step:
        start = Start.of(checkpoint)
    else:
        start = Start({n: t.detach().clone() for n, t in trainable_tensors(model).items()}, {})
    events, held = stage.run.events(), stage.prepared.eval
    evaluations, train_loss = evaluations_of(events, held, step, task=stage.plan.base.task)
    clipped = clipped_share(events, stage.plan.train.max_grad_norm)
    departures = sum(e["event"] == "rollback" or (e["event"] == "spike" and e["skipped"]) for e in events)
    return Study(
        stage,
        model,
        start,
        step,
        evaluations,
        departures,
        train_loss,
        asks=stage.plan.base.task == "causal-lm",
        clipped_share=clipped,
        spent=sum(e["overhead"] for e in events if e["event"] == "verdict" and e["step"] < step),
    )


def verdict_of(
    study: Study, further: Callable[[Evidence], Wanted | Finding] = look_further
) -> tuple[Verdict, Finding]:
    """What a look finds, with its action, what that brings and costs, and every number behind it.

    The model holds the state that was judged afterwards, unless it was wrapped anew.
    """
    try:
        evidence, finding = study.look(further)
        action = _action(study, evidence, finding)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        evidence = study.first_evidence()
        finding = Finding("undecided", "the memory did not suffice to look for the cause")
        action = Action("nothing; peftkit diagnose RUN looks again, where there is more")
    if not study.is_rewrapped:
        load_trained(study.model, study.start.trained)
    return _verdict(study, evidence, finding, action), finding


def _verdict(study: Study, evidence: Evidence, finding: Finding, action: Action) -> Verdict:
    quality = evidence.quality
    return Verdict(
        step=study.step,
        state=quality.state,
        cause=finding.cause,
        said=finding.said,
        action=action,
        loss=quality.loss,
        num_rows=len(study.deciding),
        overhead=study.budget.overhead,
        reference_overhead=study.reference_overhead,
        numbers=_numbers(study, evidence),
    )


def _action(study: Study, evidence: Evidence, finding: Finding) -> Action:
    plan, arms = study.plan, evidence.arms
    brought = study.expected_gain(finding.arm) if finding.arm else None
    cause = finding.cause
    if cause in CAPACITY and study.candidate is not None:
        return Action(
            "grow the adapter", study.candidate.overrides, brought, study.candidate.cost(study.stage)
        )
    if cause in {"learning rate too low", "learning rate too high", "unstable"}:
        arm = arms.get(finding.arm)
        rate = arm.learning_rate if arm else plan.train.learning_rate / 3
        return Action(f"train at a rate of {rate:g}", (f"train.learning_rate={rate:.6g}",), brought)
    if cause == "too few steps":
        steps = round((plan.train.num_steps or 0) * (1 + MORE_STEPS))
        return Action(f"train for {steps} steps", (f"train.max_steps={steps}",), brought)
    if cause == "data: overfitting":
        best = min(study.evaluations, key=lambda one: one.rows.mean)
        said = "more or cleaner data; with these, stop where held-out rows were best"
        return Action(said, (f"train.max_steps={best.step}",) if 0 < best.step < study.step else ())
    if cause == "data: labels or masks broken":
        return Action("look at what is learnt: peftkit check RECIPE; more training or rank mends none of it")
    if cause == "undecided" and (other := next_method(study.stage)):
        return Action(f"{study.plan.method.name} has no rank to raise: try lora", other[0], None, other[1])
    if cause == "undecided":
        return Action(_left_open(study))
    reached = evidence.quality.state == "not lagging" and study.plan.diagnose.target is not None
    return Action("nothing: it is as good as was asked for" if reached else "nothing")


def _left_open(study: Study) -> str:
    """What a person can do where nothing was proven."""
    refused = study.candidate.refused if study.candidate is not None else ""
    if refused:
        return f"the next rung is forbidden: {refused}"
    if study.plan.method.peft is None:
        return "whole models are not forked: try a smaller and a larger learning rate"
    return "give more compute to look: diagnose.bounds.compute, or a target or reference to judge by"


def _numbers(study: Study, evidence: Evidence) -> dict[str, Any]:
    """Every number behind a verdict, as plain values."""
    signals = evidence.signals
    found: dict[str, Any] = {
        "train_loss": evidence.train_loss,
        "target": evidence.quality.target,
        "behind": asdict(study.behind) if study.behind else None,
        "projected": asdict(evidence.quality.projected) if evidence.quality.projected else None,
        "worsened": asdict(evidence.quality.worsened) if evidence.quality.worsened else None,
        "dependence": asdict(evidence.dependence) if evidence.dependence else None,
        "arms": {
            name: {
                "learning_rate": arm.learning_rate,
                "num_steps": arm.num_steps,
                "loss": arm.rows.mean if arm.rows else None,
                "gain": asdict(gain(evidence.rows, arm.rows)) if arm.rows else None,
            }
            for name, arm in evidence.arms.items()
        },
        "unaffordable": sorted(evidence.unaffordable),
        "refused": study.candidate.refused if study.candidate else "",
        "clipped_share": study.clipped_share,
    }
    if signals is not None:
        found["signals"] = {
            "tangent": signals.tangent,
            "residual": signals.residual,
            "unadapted": signals.unadapted,
            "generalises": signals.generalises,
            "agreement": signals.agreement,
            "reach": signals.reach,
            "by_worth": signals.by_worth(),
            "num_rows": signals.num_rows,
        }
    if study.rung is not None:
        found["rung"] = asdict(study.rung)
    return found


def tell(stage: Stage, verdict: Verdict) -> None:
    """Write the verdict as an event, and the next recipe beside the run where there is one."""
    path, changes = stage.run.path / "next-recipe.yaml", verdict.action.overrides
    grown = [text for growth in stage.plan.growths if growth.kept for text in growth.overrides]
    hidden = any(MARK in source.path for source in stage.loaded.recipe.data.sources)
    if changes and not hidden:
        write_next_recipe(path, stage.loaded, replace_changes(verdict, (*grown, *changes)))
    else:
        path.unlink(missing_ok=True)  # of an earlier look
    stage.emit(
        "verdict",
        step=verdict.step,
        text=verdict.line,
        **{key: value for key, value in verdict.to_json().items() if key != "step"},
    )


def replace_changes(verdict: Verdict, overrides: tuple[str, ...]) -> Verdict:
    """The verdict with all that changes since the recipe, growths that were kept as well."""
    return replace(verdict, action=replace(verdict.action, overrides=overrides))


def _grow(stage: Stage, study: Study, finding: Finding, checkpoint: Path | None, *, ended: bool) -> Plan:
    """Grow the run in place: early on the schedule that it is on, at its end on a restarted one."""
    assert study.candidate is not None and study.candidate.plan is not None and checkpoint is not None
    grown = study.candidate.plan
    if ended:
        more = max(1, round(MORE_STEPS * (stage.plan.train.num_steps or 0)))
        train = replace(grown.train, num_steps=study.step + more, restart_step=study.step)
        grown = replace(grown, train=train)
    after = with_growth(grown, Growth(study.step, finding.cause, study.candidate.overrides))
    assert study.grown is not None
    kept = {} if ended else study.grown.optimizer
    write_growth(stage.run, stage.plan, after, checkpoint=checkpoint, grown=study.grown, optimizer=kept)
    stage.emit(
        "growth",
        step=study.step,
        cause=finding.cause,
        overrides=list(study.candidate.overrides),
        num_trainable=after.method.num_trainable,
        learning_rate=after.train.learning_rate,
        num_steps=after.train.num_steps,
    )
    return after


def _did_not_pay(stage: Stage, study: Study) -> Looked | None:
    """The run as it was before its last growth, where that brought nothing beyond noise."""
    growth = stage.plan.growths[-1] if stage.plan.growths else None
    if growth is None or not growth.kept or stage.plan.train.restart_step != growth.step:
        return None
    before = [one for one in study.evaluations if 0 < one.step <= growth.step]
    after = [one for one in study.evaluations if one.step > growth.step]
    if not before or not after:
        return None
    best = [min(some, key=lambda one: one.rows.mean).rows.of(study.half) for some in (before, after)]
    brought = gain(best[0], best[1])
    if brought.low > 0:
        stage.emit("growth_kept", step=study.step, gain=brought.plain)
        return None
    plan = take_back(stage.run, stage.plan)
    stage.emit("growth_taken_back", step=study.step, text=f"it brought {brought}", gain=brought.plain)
    study.evaluations = before
    quality = study.first_quality()
    said = f"the escalation at step {growth.step} brought {brought}: it was taken back"
    verdict = Verdict(
        study.step,
        quality.state,
        "undecided",
        said,
        Action("nothing"),
        quality.loss,
        len(study.deciding),
        kept=False,
    )
    tell(replace(stage, plan=plan), verdict)
    return Looked(verdict, plan, study.model, stage.plan, is_rewrapped=True)
