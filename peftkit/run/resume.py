"""Resumption of a run from its last intact checkpoint, or the list of what has changed since."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from peftkit import interrupt, ranks
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.experiments.growth import apply_growths
from peftkit.plan import make_plan, read_plan
from peftkit.plan.parallel import plan_for_ranks
from peftkit.prepare.context import RunContext, prepare_run, write_environment, write_plan_files, write_recipe
from peftkit.prepare.environment import find_changes, resolved_text
from peftkit.prepare.facts import light_facts, require_runnable
from peftkit.prepare.traced_memory import plan_with_traced_memory
from peftkit.recipe import LoadedRecipe, load
from peftkit.report import Summary, read_summary
from peftkit.run.along import lead, num_to_launch, on_any_ranks
from peftkit.run.finetune import explain_stop, train_along, train_and_publish
from peftkit.run.stations import Segment
from peftkit.rundir import MANIFEST, RunDir, lock_run, read_json, read_sealed, verify_folder, write_sealed
from peftkit.rundir.events import (
    ChangedEvent,
    DoneEvent,
    Observer,
    StepEvent,
    WarningEvent,
    ignore_event,
    last_second,
    of_type,
)
from peftkit.secrets import REDACTED

ALLOWED_CHANGES = ("data", "recipe", "start_from", "base", "tokenizer", "versions")


def resume(
    path: Path,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    allow_changed: Sequence[str] = (),
    take_over: bool = False,
    observer: Observer = ignore_event,
) -> Summary:
    """Resume a run from its newest checkpoint that verifies, or from the start where there is none.

    `recipe` is the file that the run was started with, with its `overrides`, where it held secrets: a run
    keeps none. `allow_changed` names what may differ from when the run began; a recipe that may is planned
    anew. `take_over` is for a run whose lock another machine, now gone, did not release. Raises UserError
    where there is nothing to resume, or where something else changed since.
    """
    run = RunDir.open(path)
    unknown_names = [name for name in allow_changed if name not in ALLOWED_CHANGES]
    if unknown_names:
        raise UserError(
            [
                Problem("--allow-changed", repr(name), "what may change", did_you_mean(name, list(ALLOWED_CHANGES)))
                for name in unknown_names
            ]
        )
    if not ranks.launched().is_lead:
        return train_along(load_run_recipe(run, recipe, overrides))
    with ranks.joined():
        return _resume_as_lead(run, recipe, overrides, allow_changed, take_over=take_over, observer=observer)


def num_to_launch_again(run: RunDir, asked: int | None) -> int:
    """Return the number of processes to start for a run that goes on; 0 if this one will do, or is of a launch."""
    if ranks.launched().num > 1:
        return 0
    is_planned = (run.path / "plan.json").exists()
    num = asked or (read_plan(run).ranks.num if is_planned else num_to_launch(load(run.path / "resolved.yaml")))
    return num if num > 1 else 0


def _resume_as_lead(
    run: RunDir,
    recipe: Path | None,
    overrides: Sequence[str],
    allow_changed: Sequence[str],
    *,
    take_over: bool,
    observer: Observer,
) -> Summary:
    path = run.path
    with interrupt.catch_signals(), lock_run(path, take_over=take_over), explain_stop(run):
        run.remove_leftovers()
        is_planned = (path / "plan.json").exists()
        if broken_lines := run.repair_events():
            text = f"{run.events_file.name}: {len(broken_lines)} broken lines were set aside"
            observer(WarningEvent(text=text))
        if is_planned and (summary := _complete_published(run, observer)) is not None:
            ranks.from_lead(lambda: [str(run.path.resolve()), "", True])
            return summary
        # where to go on:
        if not is_planned and run.checkpoint_steps():
            got, fix = "checkpoints without plan.json", "restore plan.json, or train again"
            raise UserError(Problem(str(run.path), got, "the plan that they were trained with", fix))
        if is_planned:
            from peftkit.run.recovery import set_aside_abandoned  # it knows the trainer, which a plan does not need

            plan = read_plan(run)
            apply_growths(run, plan)
            set_aside_abandoned(run, plan)
        checkpoint, damaged = run.newest_checkpoint()
        for fault in damaged:
            observer(WarningEvent(text=f"{fault}: skipped"))
        run.set_aside_damaged()
        context = reopen_run(run, load_run_recipe(run, recipe, overrides), observer)
        if is_planned:
            context = require_unchanged(context, allow_changed, checkpoint)
        else:
            write_plan_files(context)
        if context.plan.ranks.num != ranks.current().num:
            context = on_other_ranks(context)
        return train_and_publish(lead(Segment(context, checkpoint)))


def on_other_ranks(context: RunContext) -> RunContext:
    """Return the context of a run that goes on with another number of processes. Raises UserError if none divide."""
    num, num_before = ranks.current().num, context.plan.ranks.num
    plan = plan_for_ranks(context.plan, num)
    write_sealed(context.run.path / "plan.json", plan.to_json())
    text = f"the run began with {num_before} processes and goes on with {num}: the same rows in each step, and losses"
    context.emit(WarningEvent(text=f"{text} to rounding; dropout draws other masks"))
    return replace(context, plan=plan)


def _complete_published(run: RunDir, observer: Observer) -> Summary | None:
    """Complete a run killed right after publishing and return its summary; None without a result.

    A damaged result is set aside. Raises UserError where the run had ended before.
    """
    result = run.adapter if run.adapter.exists() else run.model
    if not result.exists():
        return None
    if faults := verify_folder(result):
        observer(WarningEvent(text=f"{'; '.join(faults)}: published again"))
        result.replace(tempfile.mkdtemp(dir=run.path, prefix=f"damaged-{result.name}-"))
        return None
    events = run.events()
    if of_type(events, DoneEvent):
        fix = "its result is in the run directory; train again with peftkit finetune"
        raise UserError(Problem(str(run.path), "a finished run", "an interrupted run", fix))
    published_step = int(read_json(result / MANIFEST)["step"])
    done = DoneEvent(
        at_seconds=last_second(events),
        step=max([*(event.step for event in of_type(events, StepEvent)), published_step]),
        published_step=published_step,
        result=result.name,
    )
    observer(run.emit(done))
    return read_summary(run)


def load_run_recipe(run: RunDir, recipe_file: Path | None, overrides: Sequence[str]) -> LoadedRecipe:
    """Return the run's own recipe, or the given one. Raises UserError where the two differ."""
    run_recipe = load(run.path / "resolved.yaml")
    if recipe_file is None:
        if any(REDACTED in source.path for source in run_recipe.recipe.data.sources):
            got = "a data source whose secrets were not stored"
            fix = f"peftkit resume {run.path} --recipe FILE [key=value ...]"
            raise UserError(Problem(str(run.path), got, "the recipe that it was started with", fix))
        return run_recipe
    loaded = load(recipe_file, overrides)
    if resolved_text(loaded) != resolved_text(run_recipe):
        fix = "drop --recipe; to change the recipe, edit resolved.yaml and pass --allow-changed recipe"
        raise UserError(Problem(str(recipe_file), "a recipe other than the run's", "its own recipe", fix))
    return loaded


def reopen_run(run: RunDir, loaded: LoadedRecipe, observer: Observer) -> RunContext:
    """Return the context of an existing run from its own recipe, with its clock where it stopped."""
    if not (run.path / "recipe.yaml").exists():
        write_recipe(loaded, run)  # killed before the copy as given: what is left of it
    is_planned = (run.path / "plan.json").exists()
    of_now = on_any_ranks(loaded) if is_planned else loaded
    facts, examples = light_facts(of_now)
    base = require_runnable(of_now, read_plan(run) if is_planned else make_plan(loaded, facts), facts)
    context = replace(prepare_run(of_now, facts, examples, base, run, observer), loaded=loaded)
    elapsed_seconds = last_second(run.events())
    return replace(context, started=context.started - elapsed_seconds)


def require_unchanged(context: RunContext, allowed_changes: Sequence[str], checkpoint: Path | None) -> RunContext:
    """Return the context once nothing has changed but what `allowed_changes` names.

    A changed recipe that is allowed is planned anew. Raises UserError for every other change.
    """
    environment = read_sealed(context.run.path / "environment.json")
    old_fingerprints = environment["fingerprints"]
    changed_parts = find_changes(old_fingerprints, context.fingerprints())
    names = {"data": ", ".join(context.plan.data.train), "base": context.plan.base.id}
    problems = [
        Problem(
            names.get(key, key),
            f"{key} that changed since the run began ({detail})",
            "the same as then",
            f"restore it, train again, or continue anyway with --allow-changed {key}",
        )
        for key, detail in changed_parts.items()
        if key not in allowed_changes
    ]
    if problems:
        raise UserError(problems)
    if environment["device"]["name"] != context.facts.device.name:
        old_device, new_device = environment["device"]["name"], context.facts.device.name
        text = f"the run began on {old_device} and continues on {new_device}: the bytes will differ"
        context.emit(WarningEvent(text=text))
    if changed_parts:
        if "recipe" in changed_parts:
            plan, _ = plan_with_traced_memory(context.loaded, context.facts, context.prepared_data.plan, context.config)
            signatures = [
                json.dumps(
                    [asdict(some_plan.method), asdict(some_plan.base), some_plan.train.optimizer],
                    sort_keys=True,
                    default=str,
                )
                for some_plan in (context.plan, plan)
            ]
            if any(growth.kept for growth in context.plan.growths):
                got = "another recipe for a run that has changed itself since"
                fix = "restore it, or train again with peftkit finetune"
                raise UserError(Problem(str(context.run.path / "resolved.yaml"), got, "what it was trained with", fix))
            if checkpoint is not None and signatures[0] != signatures[1]:
                got = f"a method, base or optimizer other than that of {checkpoint.name}"
                fix = "restore it, or train again with peftkit finetune"
                raise UserError(Problem(str(context.run.path / "resolved.yaml"), got, "what it was trained with", fix))
            # environment.json, which tells the recipe, comes last: until then the change must be allowed
            write_sealed(context.run.path / "plan.json", plan.to_json())
            context = replace(context, plan=plan)
        write_environment(context)
        context.emit(ChangedEvent(text="; ".join(f"{key} changed ({detail})" for key, detail in changed_parts.items())))
    return context
