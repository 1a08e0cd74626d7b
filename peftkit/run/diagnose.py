"""Diagnosis of a run that has ended, or of an adapter that was made elsewhere from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.diagnose.verdict import Verdict
from peftkit.errors import Problem, UserError
from peftkit.experiments.growth import apply_growths
from peftkit.experiments.look import publish_verdict, reach_verdict, start_experiment
from peftkit.model.adapter.load import load_adapter_tensors
from peftkit.plan import make_plan
from peftkit.prepare.context import RunContext, prepare_run, write_plan_files, write_recipe
from peftkit.prepare.facts import light_facts, require_runnable
from peftkit.recipe import load
from peftkit.run.resume import load_run_recipe, reopen_run, require_unchanged
from peftkit.run.stations import Segment, assemble_training, attach_adapter, load_base, run_preflight
from peftkit.rundir import RunDir, lock_run, step_of
from peftkit.rundir.events import DoneEvent, Observer, VerdictEvent, ignore_event, last_of, of_type


def last_verdict(run: RunDir) -> Verdict | None:
    """Return the verdict that a run emitted at its end; None where there was no look."""
    events = run.events()
    done, verdict = last_of(events, DoneEvent), last_of(events, VerdictEvent)
    if done is None or verdict is None or verdict.step < done.step:
        return None
    return Verdict.from_json(verdict)


def diagnose(
    path: Path,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    anew: bool = False,
    observer: Observer = ignore_event,
) -> Verdict:
    """Return the verdict on a run: its own where it has one, unless `anew`; else it is diagnosed now.

    An adapter made elsewhere needs the `recipe` that describes it, with data; files are written to `out`.
    Raises UserError where there is nothing to judge, or what it was made of has changed.
    """
    if (path / "plan.json").is_file():
        run = RunDir.open(path)
        verdict = None if anew else last_verdict(run)
        if verdict is not None:
            return verdict
        with interrupt.catch_signals(), lock_run(path):
            context = reopen_run(run, load_run_recipe(run, recipe, overrides), observer)
            apply_growths(run, context.plan)
            checkpoint, _ = run.newest_checkpoint()
            context = require_unchanged(context, (), checkpoint)
            if checkpoint is None and context.plan.method.peft is not None:  # the checkpoints are gone
                if not run.adapter.is_dir():
                    got = "no checkpoint and no adapter"
                    raise UserError(Problem(str(run.path), got, "a trained adapter"))
                return _diagnose_now(
                    context,
                    None,
                    adapter=run.adapter,
                    step=max((event.published_step for event in of_type(run.events(), DoneEvent)), default=0),
                )
            return _diagnose_now(context, checkpoint)
    if not (path / "adapter_config.json").is_file():
        raise UserError(Problem(str(path), "no run and no adapter", "a run directory, or an adapter folder"))
    # an adapter from elsewhere:
    if recipe is None:
        fix = f"peftkit diagnose {path} --recipe FILE"
        raise UserError(Problem(str(path), "an adapter without a run", "the recipe that describes it", fix))
    loaded = load(recipe, overrides)
    facts, examples = light_facts(loaded)
    plan = make_plan(loaded, facts)
    base: Any = require_runnable(loaded, plan, facts)
    run = RunDir.create(out or Path(f"{path}-diagnosis"))
    with interrupt.catch_signals(), lock_run(run.path):
        write_recipe(loaded, run)
        context = prepare_run(loaded, facts, examples, base, run, observer)
        write_plan_files(context)
        return _diagnose_now(context, None, adapter=path)


def _diagnose_now(
    context: RunContext, checkpoint: Path | None, adapter: Path | None = None, step: int | None = None
) -> Verdict:
    """Diagnose the newest checkpoint, or an adapter of a step, and publish the verdict."""
    if not context.prepared.eval:
        where = context.loaded.where(("data", "eval"))
        fix = "set data.eval: 5% and train again, or give a file of rows that were not trained on"
        raise UserError(Problem(where, "no held-out rows", "held-out rows to judge by", fix))
    segment = Segment(context, checkpoint)
    model = attach_adapter(segment, load_base(segment))
    training = assemble_training(segment, model)
    run_preflight(segment, training)
    if adapter is not None:
        load_adapter_tensors(model, adapter)
    if step is None:
        step = step_of(checkpoint) if adapter is None else (context.plan.train.num_steps or 0)
    experiment = start_experiment(context, training.trainer.model, checkpoint, step)
    verdict, _ = reach_verdict(experiment)
    publish_verdict(context, verdict)
    return verdict
