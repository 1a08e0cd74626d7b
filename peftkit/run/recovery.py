"""Recovery of a run that ran out of memory or diverged, where the recipe allows it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftkit import ranks
from peftkit.errors import UserError
from peftkit.experiments.growth import take_back_growth
from peftkit.model.hardware import is_out_of_memory, read_memory_use, release_memory
from peftkit.plan import Plan
from peftkit.plan.fit import replace_train
from peftkit.prepare import out_of_memory
from peftkit.prepare.context import RunContext
from peftkit.prepare.traced_memory import trace_memory
from peftkit.rundir import MANIFEST, RunDir, read_json, step_of, verify_folder, write_sealed
from peftkit.rundir.events import GrowthTakenBackEvent, OutOfMemoryEvent, RollbackEvent, SpikeEvent, StepEvent, last_of
from peftkit.train.guard import Diverged, divergence_problem

MAX_ROLLBACKS = 3


@dataclass(frozen=True)
class Divergence:
    """A divergence of the training, and its reason."""

    said: str
    first_step: int


Failure = Divergence | out_of_memory.Shortage


def classify_failure(context: RunContext, error: Exception) -> Failure | None:
    """Return the recoverable failure behind an error, without its frames; None where there is none."""
    if isinstance(error, Diverged):
        return Divergence(str(error), error.first_step)
    if not is_out_of_memory(error):
        return None
    usage = read_memory_use()
    last_step = last_of(context.run.events(), StepEvent)
    occupied_bytes = usage.get("peak_allocated_bytes", usage.get("resident_bytes", 0))
    step = last_step.step if last_step else None
    shortage = out_of_memory.find_shortage(error, step=step, occupied_bytes=occupied_bytes)
    if ranks.current().num > 1:  # the others are in the middle of a step: they hear of it, and stop
        where = f"{context.run.path}, rank {ranks.current().rank}"
        raise UserError(out_of_memory.shortage_problem(context.loaded, context.facts, context.plan, shortage, where))
    return shortage


def recover_run(context: RunContext, failure: Failure) -> RunContext:
    """Return the context with which to continue from the newest checkpoint.

    Raises UserError where the recipe does not allow a recovery, or all were tried.
    """
    if isinstance(failure, Divergence):
        return _roll_back(context, failure)
    return _shrink_micro_batch(context, failure)


def _roll_back(context: RunContext, failure: Divergence) -> RunContext:
    """Roll back to the last checkpoint before the first bad step, and halve the learning rate.

    Raises UserError after MAX_ROLLBACKS.
    """
    release_memory()
    rollbacks, run = context.plan.train.rollbacks, context.run
    step, skipped_step = step_of(run.newest_checkpoint()[0]), 0  # bad steps are never kept
    if step and step in [rollback_step for rollback_step, _ in rollbacks]:
        skipped_step = step  # it led to the same once more
        step = step_of(run.newest_checkpoint(below=skipped_step)[0])
    if step == 0 and any(growth.kept for growth in context.plan.growths):
        plan = take_back_growth(run, context.plan)  # nothing that was grown stands any more
        context.emit(GrowthTakenBackEvent(step=0, text=failure.said, gain=None))
        return replace(context, plan=plan)
    rate = context.plan.train.learning_rate
    if len(rollbacks) >= MAX_ROLLBACKS:
        checkpoint_note = f"; the checkpoint of step {step} is whole" if step else ""
        message = f"{failure.said}, after {len(rollbacks)} rollbacks{checkpoint_note}"
        spike = last_of(context.run.events(), SpikeEvent)
        last_rows = list(spike.rows) if spike else []
        raise UserError(divergence_problem(context.plan, message, last_rows))
    train = replace(context.plan.train, learning_rate=rate / 2, rollbacks=(*rollbacks, (step, skipped_step)))
    plan = replace_train(context.plan, train, context.facts, f"on_spike: rollback, halved after {failure.said}")
    # first of all: a kill after it goes on with all of it, one before it with none
    write_sealed(run.path / "plan.json", plan.to_json())
    set_aside_abandoned(run, plan)
    context.emit(RollbackEvent(text=failure.said, step=step, learning_rate=rate / 2, first_bad_step=failure.first_step))
    return replace(context, plan=plan)


def set_aside_abandoned(run: RunDir, plan: Plan) -> None:
    """Set aside the checkpoints that a rollback went back past; those made since stay."""
    for number, (_, skipped_step) in enumerate(plan.train.rollbacks, start=1):
        folder = run.checkpoint(skipped_step)
        is_whole = skipped_step and not verify_folder(folder, hashes=False)
        if is_whole and read_json(folder / MANIFEST).get("num_rollbacks", 0) < number:
            run.set_aside(skipped_step, "left")


def _shrink_micro_batch(context: RunContext, shortage: out_of_memory.Shortage) -> RunContext:
    """Return the context with a smaller micro-batch, where the recipe allows it.

    Raises UserError where it does not, or none is smaller.
    """
    release_memory()
    plan = (
        out_of_memory.plan_smaller_micro_batch(context.plan, context.facts, shortage)
        if context.plan.train.on_oom == "adapt"
        else None
    )
    step = step_of(context.run.newest_checkpoint()[0])
    context.emit(
        OutOfMemoryEvent(
            phase=shortage.phase,
            text=out_of_memory.describe_shortage(context.plan, shortage),
            micro_batch=context.plan.train.micro_batch,
            next_micro_batch=plan.train.micro_batch if plan else None,
            next_accumulation=plan.train.accumulation if plan else None,
            step=step,
        )
    )
    if plan is None:
        checkpoint_note = f"; the checkpoint of step {step} is whole" if step else ""
        where = f"{context.run.path}{checkpoint_note}"
        raise UserError(out_of_memory.shortage_problem(context.loaded, context.facts, context.plan, shortage, where))
    assert plan.batch is not None
    outcome = trace_memory(plan, context.facts.model.shape, context.config, plan.batch)
    plan = replace(plan, memory=outcome.memory or plan.memory)
    write_sealed(context.run.path / "plan.json", plan.to_json())
    return replace(context, plan=plan)
