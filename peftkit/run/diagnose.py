"""Diagnose a run that has ended, or an adapter that was made elsewhere from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.diagnose.verdict import Verdict
from peftkit.errors import Problem, UserError
from peftkit.experiments.growth import settle_growths
from peftkit.experiments.look import study_of, tell, verdict_of
from peftkit.plan import make_plan
from peftkit.prepare.context import Observer, Stage, open_stage, write_decided, write_recipe
from peftkit.prepare.facts import light_facts, refuse_where_it_cannot_run
from peftkit.recipe import load
from peftkit.run.finetune import assembled
from peftkit.run.resume import as_it_was, recipe_of, reopened
from peftkit.rundir import RunDir, owned, step_of


def last_verdict(run: RunDir) -> Verdict | None:
    """What a run said of itself at its end; None where it was not looked at."""
    events = run.events()
    ended = [event["step"] for event in events if event["event"] == "done"]
    said = [event for event in events if event["event"] == "verdict"]
    if not (ended and said and said[-1]["step"] >= ended[-1]):
        return None
    return Verdict.from_json(said[-1])


def diagnose(
    path: Path,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    anew: bool = False,
    observer: Observer = lambda event: None,
) -> Verdict:
    """The verdict on a run: its own where it has one, unless `anew`; else it is looked at now.

    An adapter made elsewhere needs the `recipe` that describes it, with data; what is written goes to `out`.
    Raises UserError where there is nothing to judge, or what it was made of has changed.
    """
    if (path / "plan.json").is_file():
        run = RunDir.open(path)
        found = None if anew else last_verdict(run)
        if found is not None:
            return found
        with interrupt.listening(), owned(path):
            stage = reopened(run, recipe_of(run, recipe, overrides), observer)
            settle_growths(run, stage.plan)
            checkpoint, _ = run.newest_checkpoint()
            stage = as_it_was(stage, (), checkpoint)
            if checkpoint is None and stage.plan.method.peft is not None:
                return _judged(stage, None, adapter=_published(run), step=_published_step(run))
            return _judged(stage, checkpoint)
    if not (path / "adapter_config.json").is_file():
        raise UserError(Problem(str(path), "no run and no adapter", "a run directory, or an adapter folder"))
    return _foreign(path, recipe, overrides, out, observer)


def _published(run: RunDir) -> Path:
    """The adapter of a run whose checkpoints are gone. Raises UserError where that is gone too."""
    if run.adapter.is_dir():
        return run.adapter
    raise UserError(Problem(str(run.path), "no checkpoint and no adapter", "something that was trained"))


def _published_step(run: RunDir) -> int:
    return max((event["published_step"] for event in run.events() if event["event"] == "done"), default=0)


def _judged(
    stage: Stage, checkpoint: Path | None, adapter: Path | None = None, step: int | None = None
) -> Verdict:
    """Look at the newest checkpoint, or at an adapter of a step, and say what was found."""
    _refuse_without_rows(stage)
    training, model = assembled(stage, checkpoint=checkpoint, base=None)
    if adapter is not None:
        from peftkit.model.adapter.load import load_into

        load_into(model, adapter)
    if step is None:
        step = step_of(checkpoint) if adapter is None else (stage.plan.train.num_steps or 0)
    study = study_of(stage, training.trainer.model, checkpoint, step)
    verdict, _ = verdict_of(study)
    tell(stage, verdict)
    return verdict


def _refuse_without_rows(stage: Stage) -> None:
    if not stage.prepared.eval:
        where = stage.loaded.where(("data", "eval"))
        fix = "set data.eval: 5% and train again, or give a file of rows that were not trained on"
        raise UserError(Problem(where, "no held-out rows", "rows to judge by", fix))


def _foreign(
    path: Path, recipe: Path | None, overrides: Sequence[str], out: Path | None, observer: Observer
) -> Verdict:
    """An adapter from elsewhere: the recipe stands for the run that nobody saw."""
    if recipe is None:
        fix = f"peftkit diagnose {path} --recipe FILE"
        raise UserError(Problem(str(path), "an adapter without a run", "the recipe that describes it", fix))
    loaded = load(recipe, overrides)
    facts, examples = light_facts(loaded)
    plan = make_plan(loaded, facts)
    base: Any = refuse_where_it_cannot_run(loaded, plan, facts)
    run = RunDir.create(out or Path(f"{path}-diagnosis"))
    with interrupt.listening(), owned(run.path):
        write_recipe(loaded, run)
        stage = open_stage(loaded, facts, examples, base, run, observer)
        write_decided(stage)
        return _judged(stage, None, adapter=path)
