"""A run that ran out of memory or left the road: how it goes on, where the recipe lets it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftkit.errors import UserError
from peftkit.experiments.growth import take_back
from peftkit.plan import Plan
from peftkit.plan.fit import revised
from peftkit.prepare import out_of_memory as oom
from peftkit.prepare.context import Stage
from peftkit.prepare.traced_memory import trace_memory
from peftkit.rundir import MANIFEST, RunDir, read_json, step_of, verify_folder, write_sealed
from peftkit.train.guard import Diverged, divergence

MOST_ROLLBACKS = 3


@dataclass(frozen=True)
class Departure:
    """Training left the road, and why."""

    said: str
    first_step: int


Happened = Departure | oom.Shortage


def what_happened(stage: Stage, error: Exception) -> Happened | None:
    """What can be recovered from in an error, without its frames; None where nothing can."""
    if isinstance(error, Diverged):
        return Departure(str(error), error.first_step)
    return _shortage(stage, error)


def recovered(stage: Stage, happened: Happened) -> Stage:
    """The stage with which to go on from the newest checkpoint.

    Raises UserError where the recipe, or all that was tried before, says that the run stops here.
    """
    if isinstance(happened, Departure):
        return _more_gently(stage, happened)
    return _in_smaller_pieces(stage, happened)


def _more_gently(stage: Stage, departure: Departure) -> Stage:
    """Half the learning rate, from the last checkpoint before the first bad step."""
    from peftkit.model.hardware import release

    release()
    before, run = stage.plan.train.rollbacks, stage.run
    step, dropped = step_of(run.newest_checkpoint()[0]), 0  # bad steps are never kept
    if step and step in [gone_back_to for gone_back_to, _ in before]:
        dropped = step  # it led to the same once more
        step = step_of(run.newest_checkpoint(below=dropped)[0])
    if step == 0 and any(growth.kept for growth in stage.plan.growths):
        plan = take_back(run, stage.plan)  # nothing that was grown stands any more
        stage.emit("growth_taken_back", step=0, text=departure.said, gain=None)
        return replace(stage, plan=plan)
    rate = stage.plan.train.learning_rate
    if len(before) >= MOST_ROLLBACKS:
        kept = f"; the checkpoint of step {step} is whole" if step else ""
        said = f"{departure.said}, after {len(before)} rollbacks{kept}"
        raise UserError(divergence(stage.plan, said, _last_rows(stage)))
    train = replace(stage.plan.train, learning_rate=rate / 2, rollbacks=(*before, (step, dropped)))
    plan = revised(stage.plan, train, stage.facts, f"on_spike: rollback, halved after {departure.said}")
    # first of all: a kill after it goes on with all of it, one before it with none
    write_sealed(run.path / "plan.json", plan.to_json())
    set_left_aside(run, plan)
    stage.emit(
        "rollback",
        text=departure.said,
        step=step,
        learning_rate=rate / 2,
        first_bad_step=departure.first_step,
    )
    return replace(stage, plan=plan)


def set_left_aside(run: RunDir, plan: Plan) -> None:
    """Set checkpoints aside from which a rollback went further back; those made since stay."""
    for number, (_, dropped) in enumerate(plan.train.rollbacks, start=1):
        folder = run.checkpoint(dropped)
        stands = dropped and not verify_folder(folder, hashes=False)
        if stands and read_json(folder / MANIFEST).get("num_rollbacks", 0) < number:
            run.set_aside(dropped, "left")


def _last_rows(stage: Stage) -> list[str]:
    """The rows of the last spike."""
    spikes = [event for event in stage.run.events() if event["event"] == "spike"]
    return list(spikes[-1]["rows"]) if spikes else []


def _shortage(stage: Stage, error: Exception) -> oom.Shortage | None:
    """What ran out where, for an out-of-memory error; None for any other."""
    from peftkit.model.hardware import is_out_of_memory, memory_used

    if not is_out_of_memory(error):
        return None
    used = memory_used()
    steps = [event["step"] for event in stage.run.events() if event["event"] == "step"]
    occupied = used.get("peak_allocated_bytes", used.get("resident_bytes", 0))
    return oom.shortage_of(error, step=steps[-1] if steps else None, occupied_bytes=occupied)


def _in_smaller_pieces(stage: Stage, shortage: oom.Shortage) -> Stage:
    """The stage with a smaller micro-batch, where the recipe allows it. Raises UserError where it stops."""
    from peftkit.model.hardware import release

    release()
    plan = oom.smaller(stage.plan, stage.facts, shortage) if stage.plan.train.on_oom == "adapt" else None
    step = step_of(stage.run.newest_checkpoint()[0])
    stage.emit(
        "oom",
        phase=shortage.phase,
        text=oom.exceeded(stage.plan, shortage),
        micro_batch=stage.plan.train.micro_batch,
        next_micro_batch=plan.train.micro_batch if plan else None,
        next_accumulation=plan.train.accumulation if plan else None,
        step=step,
    )
    if plan is None:
        kept = f"; the checkpoint of step {step} is whole" if step else ""
        where = f"{stage.run.path}{kept}"
        raise UserError(oom.problem(stage.loaded, stage.facts, stage.plan, shortage, where))
    assert plan.batch is not None
    found = trace_memory(plan, stage.facts.model.shape, stage.config, plan.batch)
    plan = replace(plan, memory=found.memory or plan.memory)
    write_sealed(stage.run.path / "plan.json", plan.to_json())
    return replace(stage, plan=plan)
