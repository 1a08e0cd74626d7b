"""THE FLOW: a recipe becomes a trained adapter. Read it from top to bottom.

finetune        recipe -> facts -> plan -> data -> run directory, then segment after segment
train_segment   model -> adapter -> preflight -> train -> diagnose -> publish: one line per station
stations.py     the stations themselves
along.py        the other processes of a run on several GPUs, which follow the lead
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from peftkit import interrupt, ranks
from peftkit.errors import Interrupted, PeftkitError, Problem, UserError
from peftkit.plan import Plan, make_plan
from peftkit.prepare.context import prepare_run, write_plan_files, write_recipe
from peftkit.prepare.facts import light_facts, require_runnable
from peftkit.prepare.vocabulary import require_tokens_of_folder
from peftkit.recipe import LoadedRecipe
from peftkit.report import Summary, read_summary
from peftkit.run import stations
from peftkit.run.along import follow, lead
from peftkit.run.stations import Finished, Segment
from peftkit.rundir import RunDir, is_disk_full, lock_run, step_of
from peftkit.rundir.disk import next_free_path
from peftkit.rundir.events import InterruptedEvent, Observer, PhaseEvent, ResumeEvent, ignore_event


def finetune(loaded: LoadedRecipe, *, out: Path | None = None, observer: Observer = ignore_event) -> Summary:
    """Train what a recipe describes, into a fresh run directory. Returns its summary.

    Raises UserError for the user's mistakes (before anything heavy is imported, where that shows them), and
    Interrupted on a signal, after a checkpoint.
    """
    if not ranks.launched().is_lead:
        return train_along(loaded)
    facts, examples = light_facts(loaded)
    first_plan = make_plan(loaded, facts)  # without torch: a mistake costs a second
    require_tokens_of_folder(loaded, first_plan)
    base = require_runnable(loaded, first_plan, facts)
    with ranks.joined() as place:  # of one process: alone
        if first_plan.ranks.num != place.num:
            raise PeftkitError(f"{first_plan.ranks.num} processes are planned, and {place.num} trains")
        with new_run(out or default_out(loaded)) as run:
            write_recipe(loaded, run)
            observer(PhaseEvent(name="base", detail=first_plan.base.id))
            context = prepare_run(loaded, facts, examples, base, run, observer)  # data, then the final plan
            write_plan_files(context)
            return train_and_publish(lead(Segment(context)))


def train_along(loaded: LoadedRecipe) -> Summary:
    """Train along in a run that another process leads. Returns its summary."""
    with ranks.joined(), interrupt.catch_signals():
        outcome = follow(loaded)
        return outcome.summary if isinstance(outcome, Finished) else train_and_publish(outcome)


def train_and_publish(segment: Segment) -> Summary:
    """Train segment after segment until the result is published.

    A training is one segment, unless a look comes before its end, the recipe asks to recover from a divergence
    or from running out of memory, or the process is stopped and resumed. A look has a checkpoint before it.
    """
    from peftkit.run.recovery import Failure, classify_failure, recover_run

    while True:
        context = segment.context
        outcome: Segment | Finished | Failure
        try:
            outcome = train_segment(segment)
        except Interrupted:
            with suppress(OSError):  # a full disk: the stop is what is reported
                step = step_of(context.run.newest_checkpoint()[0])
                context.emit(InterruptedEvent(step=step))
            raise
        except Exception as error:
            failure = classify_failure(context, error)
            if failure is None:
                raise
            outcome = failure
        if isinstance(outcome, Finished):
            return outcome.summary
        if isinstance(outcome, Failure):
            # outside the handler, whose traceback held the tensors that were in the way; so did the segment
            segment = Segment(context)
            plan = stations.plan_of_lead(lambda *failed: recover_run(*failed).plan, context, outcome)
            outcome = Segment(replace(context, plan=plan))
        segment = outcome.from_newest_checkpoint()


def train_segment(segment: Segment) -> Segment | Finished:
    """Train from a checkpoint, or from the start, to the next look or to the published result."""
    context, checkpoint = segment.context, segment.checkpoint
    model = stations.load_base(segment)
    model = stations.attach_adapter(segment, model)
    training = stations.assemble_training(segment, model)
    preflight = stations.run_preflight(segment, training)
    if context.plan.train.rate_search is not None:  # what follows begins anew, at the rate that is found
        return stations.segment_after_rate_search(context, model)
    if checkpoint is None:
        stations.report_metric(context, model, "before")
        training.evaluate_start()
    else:
        context.emit(ResumeEvent(step=step_of(checkpoint)))
        interrupt.stop_if_requested()

    step = stations.train_to_next_look(context, training, model, checkpoint, preflight)
    ranks.from_lead(lambda: None)  # its last checkpoint is on disk
    at_end = training.has_ended(step)
    if step < (context.plan.train.num_steps or 0):
        interrupt.stop_if_requested()

    look = stations.diagnose_if_due(context, training, step=step, at_end=at_end)
    if look is not None and (look.is_rewrapped or not at_end):  # experiments took the model, or it goes on
        return stations.segment_after_look(look, context, training)

    published_step = training.load_best(step)
    stations.refuse_non_finite(context, model)
    stations.report_metric(context, model, "after")
    ranks.from_lead(lambda: stations.publish(context, model, step=step, published_step=published_step))
    return Finished(read_summary(context.run))


def dry_run(loaded: LoadedRecipe) -> Plan:
    """Return the plan as far as it can be made without torch, weights and network."""
    facts, _ = light_facts(loaded)
    plan = make_plan(loaded, facts)
    require_tokens_of_folder(loaded, plan)
    return plan


def default_out(loaded: LoadedRecipe) -> Path:
    """Return runs/NAME, or runs/NAME-2 and so on where that exists; always inside runs/."""
    name = Path(loaded.name).stem.strip(". ") or "recipe"
    return next_free_path(Path("runs") / name)


@contextmanager
def new_run(path: Path) -> Iterator[RunDir]:
    """Create a run directory and own it: locked, signals caught, a stop explained.

    An error before the plan is written leaves no folder behind, or only the empty one that was there.
    """
    folder_existed = path.exists()
    run = RunDir.create(path)
    with interrupt.catch_signals(), lock_run(run.path), explain_stop(run):
        RunDir.create(path)  # another may have begun and ended a run here before the lock
        run.remove_leftovers()
        try:
            yield run
        except Interrupted:
            raise
        except BaseException:
            if not (run.path / "plan.json").exists():
                run.discard(keep_folder=folder_existed)
            raise


@contextmanager
def explain_stop(run: RunDir) -> Iterator[None]:
    """Explain a stop by a signal or a full disk: what is kept, and how to continue."""
    try:
        yield
    except Interrupted as error:
        steps = run.checkpoint_steps()
        kept = f"with a checkpoint at step {steps[-1]}" if steps else "before the first checkpoint"
        text = f"stopped {kept}. Continue with: peftkit resume {run.path}"
        raise Interrupted(text, exit_code=error.exit_code) from None
    except Exception as error:
        if not is_disk_full(error):
            raise
        steps = run.checkpoint_steps()
        kept = f"the checkpoint at step {steps[-1]} is intact" if steps else "there is no checkpoint yet"
        resume_hint = f", then continue with: peftkit resume {run.path}" if run.path.exists() else ""
        got = f"a full disk ({error}); {kept}"
        raise UserError(Problem(str(run.path), got, "free disk space", f"make room{resume_hint}")) from None
