"""Go on exactly where the last good checkpoint stands, or say what has changed since."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.experiments.growth import settle_growths
from peftkit.model.base.identity import differences
from peftkit.plan import make_plan, read_plan
from peftkit.prepare.context import (
    Observer,
    Stage,
    open_stage,
    write_decided,
    write_environment,
    write_recipe,
)
from peftkit.prepare.environment import resolved_text
from peftkit.prepare.facts import light_facts, refuse_where_it_cannot_run
from peftkit.prepare.traced_memory import settle
from peftkit.recipe import LoadedRecipe, load
from peftkit.report import Summary, read_summary
from peftkit.run.finetune import told, train_and_publish
from peftkit.rundir import MANIFEST, RunDir, owned, read_json, read_sealed, verify_folder, write_sealed
from peftkit.secrets import MARK

CHANGES = ("data", "recipe", "base", "tokenizer", "versions")


def resume(
    path: Path,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    allow_changed: Sequence[str] = (),
    take_over: bool = False,
    observer: Observer = lambda event: None,
) -> Summary:
    """Go on with a run from its newest checkpoint that verifies, or from the start where there is none.

    `recipe` is the file that the run was made of, with `overrides`, where it held secrets: a run keeps none.
    `allow_changed` names what may differ from when the run began; a recipe that may is decided anew.
    `take_over` is for a run that another machine, which is gone, did not release. Raises UserError where
    there is nothing to go on with, or where something else changed since.
    """
    run = RunDir.open(path)
    _check_names(allow_changed)
    with interrupt.listening(), owned(path, take_over=take_over), told(run):
        run.sweep()
        is_planned = (path / "plan.json").exists()
        if lines := run.mend_events():
            text = f"{run.events_file.name}: {len(lines)} broken lines were set aside"
            observer({"event": "warning", "text": text})
        if is_planned and (summary := _finished(run, observer)) is not None:
            return summary
        checkpoint = _checkpoint_of(run, is_planned, observer)
        stage = reopened(run, recipe_of(run, recipe, overrides), observer)
        if is_planned:
            stage = as_it_was(stage, allow_changed, checkpoint)
        else:
            write_decided(stage)
        return train_and_publish(stage, checkpoint=checkpoint)


def _check_names(allowed: Sequence[str]) -> None:
    unknown = [name for name in allowed if name not in CHANGES]
    if unknown:
        raise UserError(
            [
                Problem("--allow-changed", repr(name), "what may change", did_you_mean(name, list(CHANGES)))
                for name in unknown
            ]
        )


def _checkpoint_of(run: RunDir, is_planned: bool, observer: Observer) -> Path | None:
    """Where to go on: the newest checkpoint that verifies. Others are told, and set aside.

    Raises UserError where checkpoints stand and the plan that they were made by does not.
    """
    if not is_planned and run.checkpoint_steps():
        got, fix = "checkpoints without plan.json", "put plan.json back, or train anew"
        raise UserError(Problem(str(run.path), got, "the plan that they were made by", fix))
    if is_planned:
        from peftkit.run.recovery import set_left_aside  # it knows the trainer, which a plan does not need

        plan = read_plan(run)
        settle_growths(run, plan)
        set_left_aside(run, plan)
    checkpoint, skipped = run.newest_checkpoint()
    for fault in skipped:
        observer({"event": "warning", "text": f"{fault}: passed over"})
    run.set_damaged_aside()
    return checkpoint


def _finished(run: RunDir, observer: Observer) -> Summary | None:
    """The summary of a run whose result was published just before it was killed; None where there is none.

    A result that is not whole is set aside. Raises UserError where the run ended long ago.
    """
    result = run.adapter if run.adapter.exists() else run.model
    if not result.exists():
        return None
    if faults := verify_folder(result):
        observer({"event": "warning", "text": f"{'; '.join(faults)}: made again"})
        result.replace(tempfile.mkdtemp(dir=run.path, prefix=f"damaged-{result.name}-"))
        return None
    events = run.events()
    if any(event["event"] == "done" for event in events):
        fix = "its result stands beside it; train anew with peftkit finetune"
        raise UserError(Problem(str(run.path), "a run that is finished", "an interrupted run", fix))
    last = max((event.get("at_seconds", 0.0) for event in events), default=0.0)
    steps = [event["step"] for event in events if event["event"] == "step"]
    step = int(read_json(result / MANIFEST)["step"])
    fields = {"step": max([*steps, step]), "published_step": step, "result": result.name}
    observer(run.emit("done", at_seconds=last, **fields))
    return read_summary(run)


def recipe_of(run: RunDir, given: Path | None, overrides: Sequence[str]) -> LoadedRecipe:
    """The run's own recipe, or the one that it was made of. Raises UserError where the two differ."""
    kept = load(run.path / "resolved.yaml")
    if given is None:
        if any(MARK in source.path for source in kept.recipe.data.sources):
            got, fix = (
                "a source whose secrets were not kept",
                f"peftkit resume {run.path} --recipe FILE [key=value ...]",
            )
            raise UserError(Problem(str(run.path), got, "the recipe that it was made of", fix))
        return kept
    loaded = load(given, overrides)
    if resolved_text(loaded) != resolved_text(kept):
        fix = "leave --recipe out; to change the recipe, edit resolved.yaml and --allow-changed recipe"
        raise UserError(Problem(str(given), "another recipe than the run's", "the one it was made of", fix))
    return loaded


def reopened(run: RunDir, loaded: LoadedRecipe, observer: Observer) -> Stage:
    """The run's stage from its own recipe, as far as time goes where it stopped."""
    if not (run.path / "recipe.yaml").exists():
        write_recipe(loaded, run)  # killed before the copy as given: what is left of it
    facts, examples = light_facts(loaded)
    plan = read_plan(run) if (run.path / "plan.json").exists() else make_plan(loaded, facts)
    base = refuse_where_it_cannot_run(loaded, plan, facts)
    stage = open_stage(loaded, facts, examples, base, run, observer)
    spent = max((event.get("at_seconds", 0.0) for event in run.events()), default=0.0)
    return replace(stage, started=stage.started - spent)


def as_it_was(stage: Stage, allowed: Sequence[str], checkpoint: Path | None) -> Stage:
    """The stage, once nothing has changed but what may. A changed recipe that may is decided anew."""
    environment = read_sealed(stage.run.path / "environment.json")
    before = environment["fingerprints"]
    changed = changes(before, stage.fingerprints())
    names = {"data": ", ".join(stage.plan.data.train), "base": stage.plan.base.id}
    problems = [
        Problem(
            names.get(key, key),
            f"{key} that changed since the run began ({said})",
            "the same as then",
            f"restore it, train anew, or go on all the same with --allow-changed {key}",
        )
        for key, said in changed.items()
        if key not in allowed
    ]
    if problems:
        raise UserError(problems)
    if environment["device"]["name"] != stage.facts.device.name:
        then, now = environment["device"]["name"], stage.facts.device.name
        text = f"the run began on {then} and goes on on {now}: not to the same bytes"
        stage.emit("warning", text=text)
    if changed:
        if "recipe" in changed:
            stage = _decided_anew(stage, checkpoint)
        write_environment(stage)
        stage.emit("changed", text="; ".join(f"{key} changed ({said})" for key, said in changed.items()))
    return stage


def _decided_anew(stage: Stage, checkpoint: Path | None) -> Stage:
    """The stage with the plan of a changed recipe. Raises UserError where the checkpoint is of another."""
    plan, _ = settle(stage.loaded, stage.facts, stage.looked.plan, stage.config)
    kinds = [
        json.dumps([asdict(one.method), asdict(one.base), one.train.optimizer], sort_keys=True, default=str)
        for one in (stage.plan, plan)
    ]
    if checkpoint is not None and kinds[0] != kinds[1]:
        got = f"another method, base or optimizer than that of {checkpoint.name}"
        fix = "put it back, or train anew with peftkit finetune"
        raise UserError(Problem(str(stage.run.path / "resolved.yaml"), got, "what it was trained by", fix))
    # environment.json, which tells the recipe, comes last: until then the change has to be allowed again
    write_sealed(stage.run.path / "plan.json", plan.to_json())
    return replace(stage, plan=plan)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs, by the name under which it may be allowed, in words."""
    found = {}
    for key in ("recipe", "data", "tokenizer"):
        if before[key] != now[key]:
            found[key] = f"sha256 {before[key][:8]} then, {now[key][:8]} now"
    if base := differences(before["base"], now["base"]):
        found["base"] = f"other {' and '.join(base)}"
    others = [
        f"{name} {before['versions'].get(name)} then, {version} now"
        for name, version in now["versions"].items()
        if before["versions"].get(name) != version
    ]
    if others:
        found["versions"] = "; ".join(others)
    return found
