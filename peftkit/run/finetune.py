"""THE FLOW: a recipe becomes a trained adapter. Read it from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import interrupt
from peftkit.errors import Interrupted, PeftkitError, Problem, UserError
from peftkit.evaluate.scores import measure
from peftkit.model.base.identity import IDENTITY
from peftkit.plan import Plan, make_plan
from peftkit.plan.packing import mean_tokens
from peftkit.prepare.calibration import calibrate, compare_memory
from peftkit.prepare.context import Observer, Stage, note_weights, open_stage, write_decided, write_recipe
from peftkit.prepare.facts import light_facts, refuse_where_it_cannot_run
from peftkit.recipe import LoadedRecipe
from peftkit.report import Summary, read_summary
from peftkit.rundir import RunDir, is_full, owned, publish_folder, step_of, write_sealed

if TYPE_CHECKING:
    from peftkit.experiments.look import Looked


def default_out(loaded: LoadedRecipe) -> Path:
    """runs/NAME, or runs/NAME-2 and so on where that is taken; never outside of runs/."""
    name = Path(loaded.name).stem.strip(". ") or "recipe"
    candidate, number = Path("runs") / name, 1
    while candidate.exists():
        number += 1
        candidate = Path("runs") / f"{name}-{number}"
    return candidate


def dry_run(loaded: LoadedRecipe) -> Plan:
    """The plan as far as it can be made without torch, weights and network."""
    facts, _ = light_facts(loaded)
    return make_plan(loaded, facts)


def finetune(
    loaded: LoadedRecipe, *, out: Path | None = None, observer: Observer = lambda event: None
) -> Summary:
    """Train what a recipe describes, into a fresh run directory. Returns its summary.

    Raises UserError for what the user can mend (before anything heavy is imported, where that shows it) and
    Interrupted on a signal, after a checkpoint.
    """
    facts, examples = light_facts(loaded)
    plan = make_plan(loaded, facts)
    base = refuse_where_it_cannot_run(loaded, plan, facts)
    path = out or default_out(loaded)
    was_there = path.exists()
    run = RunDir.create(path)
    with interrupt.listening(), owned(run.path), told(run):
        RunDir.create(path)  # another may have begun and ended a run between the two
        run.sweep()
        try:
            write_recipe(loaded, run)
            observer({"event": "phase", "name": "base", "detail": plan.base.id})
            stage = open_stage(loaded, facts, examples, base, run, observer)
            write_decided(stage)
        except Interrupted:
            raise
        except BaseException:
            # nothing was decided yet: what is to be mended leaves no folder behind
            run.discard(keep_folder=was_there)
            raise
        return train_and_publish(stage, checkpoint=None)


@contextmanager
def told(run: RunDir) -> Iterator[None]:
    """A stop by a signal or by a full disk, told with what is kept and how to go on."""
    try:
        yield
    except Interrupted as error:
        kept = _kept(run, "stopped with a checkpoint of step {}", "stopped before the first checkpoint")
        text = f"{kept}. Go on with: peftkit resume {run.path}"
        raise Interrupted(text, exit_code=error.exit_code) from None
    except Exception as error:
        if not is_full(error):
            raise
        kept = _kept(run, "the checkpoint of step {} is whole", "there is no checkpoint yet")
        again = f", then go on with: peftkit resume {run.path}" if run.path.exists() else ""
        got = f"a disk without room ({error}); {kept}"
        raise UserError(Problem(str(run.path), got, "room to write", f"make room{again}")) from None


def _kept(run: RunDir, some: str, none: str) -> str:
    steps = run.checkpoint_steps()
    return some.format(steps[-1]) if steps else none


def train_and_publish(stage: Stage, *, checkpoint: Path | None) -> Summary:
    """Everything from loading to publishing, again from a checkpoint where that can mend what went wrong."""
    from peftkit.run.recovery import recovered, what_happened

    base: Any = None
    while True:
        try:
            looked = _go(stage, checkpoint=checkpoint, base=base)
            if looked is None:
                return read_summary(stage.run)
            stage, base = looked
            checkpoint, _ = stage.run.newest_checkpoint()
            continue
        except Interrupted:
            with suppress(OSError):  # a full disk: the stop is what is told
                stage.emit("interrupted", step=step_of(stage.run.newest_checkpoint()[0]))
            raise
        except Exception as error:
            happened = what_happened(stage, error)
            if happened is None:
                raise
        # outside the handler: the traceback held the tensors that were in the way
        base = None
        stage = recovered(stage, happened)
        checkpoint, _ = stage.run.newest_checkpoint()


def assembled(stage: Stage, *, checkpoint: Path | None, base: Any) -> tuple[Any, Any]:
    """(training, model): loaded unless the base is in memory, wrapped, and proven on the longest rows."""
    from transformers import set_seed

    from peftkit.experiments.look import is_due
    from peftkit.model.adapter import attach as adapter
    from peftkit.model.hardware import memory_used, reset_peak
    from peftkit.model.load import load_model
    from peftkit.train import assemble

    plan, run = stage.plan, stage.run
    if base is None:
        _tell_start(stage)
    interrupt.stop_if_requested()
    set_seed(plan.seed)
    model = base or load_model(
        stage.source, plan.base, device=plan.device, tell=lambda text: stage.emit("warning", text=text)
    )
    interrupt.stop_if_requested()
    note_weights(stage)
    model = adapter.attach(model, plan, stage.tokenizer, eva_batches=_batches(stage))
    adapter.save_start(
        model, plan, run.path / "adapter_start", afresh=checkpoint is None and not run.adapter.exists()
    )
    _tell_parameters(stage, model)
    reset_peak()
    due = tuple(step for step in plan.diagnose.look_steps if is_due(stage, step, ended=False))
    training = assemble(
        model,
        replace(plan, diagnose=replace(plan.diagnose, look_steps=due)),  # it stops at looks still due
        stage.tokenizer,
        prepared=stage.prepared,
        run=run,
        emit=stage.emit,
        checkpoint=checkpoint,
        facts={"fingerprints": stage.fingerprints(), "num_rollbacks": len(plan.train.rollbacks)},
    )
    passed = training.preflight()
    stage.emit("preflight", **asdict(passed), memory=memory_used())
    interrupt.stop_if_requested()
    return training, model


def _go(stage: Stage, *, checkpoint: Path | None, base: Any) -> tuple[Stage, Any] | None:
    """Load, wrap, measure, train, look, measure again, publish the best.

    `base` is the model where it is in memory. After a look that wrapped it anew, or came before the end,
    gives the stage and the base to go on with from the newest checkpoint.
    """
    from peftkit.experiments.look import is_due, looked_at

    plan, run = stage.plan, stage.run
    training, model = assembled(stage, checkpoint=checkpoint, base=base)
    if checkpoint is None:
        _measure(stage, model, "before")
        training.measure_start()
    else:
        stage.emit("resume", step=step_of(checkpoint))
        interrupt.stop_if_requested()
    step = _train(stage, training, model, checkpoint)
    ended = training.has_ended(step)
    if step < (plan.train.num_steps or 0):
        interrupt.stop_if_requested()
    if is_due(stage, step, ended=ended):
        looked = looked_at(stage, training, step=step, ended=ended)
        if looked.is_rewrapped or not ended:
            return _after(stage, looked, training)
    published_step = training.take_best(step)
    _refuse_non_finite(stage, model)
    _measure(stage, model, "after")
    _publish(stage, model, published_step)
    from peftkit.model.hardware import memory_used

    result = run.adapter if plan.method.peft else run.model
    stage.emit("done", step=step, published_step=published_step, result=result.name, memory=memory_used())
    mean = mean_tokens(plan, stage.facts)
    calibrate(run, plan, stage.facts.model.shape, device=stage.facts.device.name, mean_tokens=mean)
    return None


def _train(stage: Stage, training: Any, model: Any, checkpoint: Path | None) -> int:
    """Train to the next look or the end, and compare the memory that it took. Returns the step."""
    from peftkit.experiments.look import is_due
    from peftkit.model.hardware import memory_used, release, reset_peak
    from peftkit.model.meta.tensors import tensor_bytes

    if checkpoint is not None and is_due(stage, step_of(checkpoint), ended=False):
        return step_of(checkpoint)  # killed before it was looked at
    release()
    reset_peak()
    before = memory_used().get("resident_bytes", 0) - tensor_bytes(model)
    step = int(training.run())
    compared = compare_memory(stage.plan, memory_used(), before)
    if compared is not None:
        stage.emit("memory", **compared)
    return step


def _after(stage: Stage, looked: Looked, training: Any) -> tuple[Stage, Any]:
    """The stage and the base with which the run goes on from the newest checkpoint."""
    from peftkit.experiments.experiment import bare
    from peftkit.model.hardware import release

    base = bare(replace(stage, plan=looked.wrapped), looked.model) if looked.model is not None else None
    training.trainer = None  # its optimizer holds what was trained until here
    release()
    return replace(stage, plan=looked.plan), base


def _publish(stage: Stage, model: Any, step: int) -> None:
    """The result, with what it was trained on."""
    from peftkit.model.adapter import attach as adapter

    plan, run = stage.plan, stage.run
    stage.emit("phase", name="publish", detail="adapter" if plan.method.peft else "model")
    target = run.adapter if plan.method.peft else run.model
    with publish_folder(target, step=step, base=plan.base.id) as folder:
        adapter.save_result(model, plan, stage.tokenizer, folder, start=run.path / "adapter_start")
        write_sealed(folder / IDENTITY, {"step": step, **stage.fingerprints()})


def _tell_start(stage: Stage) -> None:
    """What goes in, before anything is loaded."""
    plan, prepared = stage.plan, stage.prepared
    stage.emit(
        "data",
        num_train=len(prepared.train),
        num_eval=len(prepared.eval),
        num_tokens=prepared.num_tokens,
        num_learnt=prepared.num_learnt,
        num_dropped=prepared.fitted.num_dropped,
        num_cut=prepared.fitted.num_cut,
        default_template=prepared.default_template,
        chats=stage.looked.chats,
    )
    if plan.base.trust_remote_code:
        stage.emit("warning", text=f"code that comes with {plan.base.id} runs, as the recipe allows")
    stage.emit("phase", name="model", detail=plan.method.name)


def _refuse_non_finite(stage: Stage, model: Any) -> None:
    """Nothing that is not a number is ever published."""
    from peftkit.model.adapter.attach import non_finite

    names = non_finite(model)
    if names:
        where = f"{stage.run.path}, train.learning_rate {stage.plan.train.learning_rate:g}"
        got = f"{len(names)} trained tensors with NaN or infinity (for example {names[0]})"
        fix = f"training diverged: try a learning rate of {stage.plan.train.learning_rate / 10:g}"
        raise UserError(Problem(where, got, "finite weights", fix))


def _batches(stage: Stage) -> list[dict[str, Any]]:
    """A few tokenized rows for initialisations that look at the data (EVA)."""
    import torch

    rows = stage.prepared.train[:64]
    return [
        {"input_ids": torch.tensor([row.input_ids]), "attention_mask": torch.ones(1, len(row.input_ids))}
        for row in rows
    ]


def _tell_parameters(stage: Stage, model: Any) -> None:
    from peftkit.model.adapter import attach as adapter

    trainable, total = adapter.count_parameters(model)
    by_role = adapter.trainable_by_role(model, stage.plan)
    stage.emit(
        "parameters",
        num_trainable=trainable,
        num_total=total,
        by_role=by_role,
        num_planned=stage.plan.method.num_trainable,
    )
    if trainable == 0:
        raise PeftkitError("nothing would be trained: no parameter of the model is trainable")


def _measure(stage: Stage, model: Any, when: str) -> None:
    """The recipe's metric on held-out examples, before or after training."""
    wanted = stage.plan.evaluate
    if wanted.metric is None or not stage.prepared.eval_examples:
        return
    from peftkit.model.hardware import memory_used

    stage.emit("phase", name="metric", detail=f"{wanted.metric} {when} training")
    measured = measure(
        model,
        stage.tokenizer,
        stage.plan,
        stage.prepared.eval_examples[: wanted.max_examples],
        stage.prepared.eval[: wanted.max_examples],
    )
    stage.emit(
        "metric",
        when=when,
        name=wanted.metric,
        value=measured.scores[wanted.metric],
        scores=measured.scores,
        num_examples=measured.num_examples,
        samples=measured.samples,
        memory=memory_used(),
    )
