"""THE FLOW: a recipe becomes a trained adapter. Read it from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.data.examples import Examples
from peftkit.data.gate.report import DataReport
from peftkit.data.prepare import Prepared
from peftkit.errors import Interrupted, PeftkitError, Problem, UserError
from peftkit.plan import Facts, Plan, make_plan
from peftkit.plan.packing import mean_tokens
from peftkit.recipe import LoadedRecipe, load
from peftkit.recipe.document import dump_text
from peftkit.recipe.paths import shown
from peftkit.report import Summary, read_plan, read_summary
from peftkit.run import oom
from peftkit.run.check import Looked, look
from peftkit.run.compare import calibrate, compare_memory
from peftkit.run.environment import environment, fingerprints
from peftkit.run.facts import (
    converted,
    light_facts,
    memory_problems,
    model_facts,
    read,
    refuse_where_it_cannot_run,
)
from peftkit.run.measure import measure
from peftkit.run.memory import settle, trace_memory
from peftkit.rundir import RunDir, publish_folder, read_json, write_json, write_text

Observer = Callable[[dict[str, Any]], None]


def default_out(loaded: LoadedRecipe) -> Path:
    """runs/NAME, or runs/NAME-2 and so on where that is taken."""
    name = Path(loaded.name).stem
    candidate, number = Path("runs") / name, 1
    while candidate.exists():
        number += 1
        candidate = Path("runs") / f"{name}-{number}"
    return candidate


def dry_run(loaded: LoadedRecipe) -> Plan:
    """The plan as far as it can be made without torch, weights and network."""
    facts, _ = light_facts(loaded)
    return make_plan(loaded, facts)


@dataclass(frozen=True)
class _Stage:
    """What the steps below hand to each other."""

    run: RunDir
    loaded: LoadedRecipe
    facts: Facts
    config: Mapping[str, Any]
    plan: Plan
    source: str
    looked: Looked
    observer: Observer
    started: float

    @property
    def tokenizer(self) -> Any:
        return self.looked.tokenizer

    @property
    def prepared(self) -> Prepared:
        return self.looked.prepared

    def fingerprints(self) -> dict[str, str | None]:
        """Of the data and the base, as they are now."""
        return fingerprints(self.source, self.prepared)

    def emit(self, event: str, **fields: Any) -> None:
        """Write an event and show it."""
        self.observer(self.run.emit(event, at_seconds=round(time.monotonic() - self.started, 3), **fields))


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
    run = RunDir.create(out or default_out(loaded))
    try:
        with interrupt.listening():
            observer({"event": "phase", "name": "base", "detail": plan.base.id})
            stage = _open(loaded, facts, examples, base, run, observer)
            _write_inputs(loaded, stage)
            return _train_and_publish(stage, checkpoint=None)
    finally:
        with suppress(OSError):
            run.path.rmdir()  # only where nothing was written: an empty folder is not a run


def _open(
    loaded: LoadedRecipe, facts: Facts, examples: Examples | None, base: Any, run: RunDir, observer: Observer
) -> _Stage:
    """Tokenizer and data first, so that bad data costs no model load; then the plan for the rows left."""
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import loadable

    started = time.monotonic()
    source = loadable(base, loaded.where(("base", "id")))
    interrupt.stop_if_requested("interrupted before training; nothing was written")
    examples = read(loaded) if examples is None else examples
    plan_device = facts.device.kind
    whole = converted(base, source)
    facts = Facts(detect_device(), model_facts(loaded, whole, examples), None)
    names = ", ".join(Path(shown(source.path)).name for source in loaded.recipe.data.sources)
    observer({"event": "phase", "name": "data", "detail": names})
    if facts.device.kind != plan_device:
        text = f"the driver shows a {plan_device} device, but torch uses {facts.device.name}"
        observer({"event": "warning", "text": f"{text}: is the right torch installed?"})
    looked = look(loaded, facts, examples, source)
    facts, plan = looked.facts, looked.plan
    _tell_report(looked.report, observer)
    if (run.path / "plan.json").exists():
        plan = read_plan(run)  # a run that goes on is planned already
    else:
        plan, note = settle(loaded, facts, plan, whole.config or {})
        if note:
            observer({"event": "warning", "text": note})
        if problems := memory_problems(loaded, plan, facts, slack=1.0):
            raise UserError(problems)
    return _Stage(run, loaded, facts, whole.config or {}, plan, source, looked, observer, started)


def _tell_report(report: DataReport, observer: Observer) -> None:
    """What the data gate says. Raises UserError where a check fails that is not waived."""
    observer({"event": "checks", "verdict": report.verdict, "batching": report.totals.batching})
    for finding in report.findings:
        if finding.status in {"warn", "waived"}:
            word = "waived: " if finding.status == "waived" else ""
            observer({"event": "warning", "text": f"{word}{finding.check}: {finding.said}"})
    if report.failed:
        raise UserError(report.problems())


def _write_inputs(loaded: LoadedRecipe, stage: _Stage) -> None:
    """As given, resolved, decided, and with what. plan.json last: it is what makes the folder a run."""
    resolved = dump_text(loaded.recipe.model_dump(mode="json", exclude_unset=True))
    write_text(stage.run.path / "recipe.yaml", loaded.text or resolved)
    write_text(stage.run.path / "resolved.yaml", resolved)
    if any(shown(source.path) != source.path for source in loaded.recipe.data.sources):
        for name in ("recipe.yaml", "resolved.yaml"):
            (stage.run.path / name).chmod(0o600)  # a URL in them may hold a password
    write_json(stage.run.path / "data.json", stage.looked.report.to_json())
    write_json(stage.run.path / "environment.json", environment(stage.facts.device, stage.fingerprints()))
    write_json(stage.run.path / "plan.json", stage.plan.to_json())


def _train_and_publish(stage: _Stage, *, checkpoint: Path | None) -> Summary:
    """Everything from loading to publishing; a stop on the way says how to go on."""
    while True:
        shortage = None
        try:
            _go(stage, checkpoint=checkpoint)
            return read_summary(stage.run)
        except Interrupted as error:
            steps = stage.run.checkpoint_steps()
            stage.emit("interrupted", step=steps[-1] if steps else 0)
            kept = f"with a checkpoint of step {steps[-1]}" if steps else "before the first checkpoint"
            text = f"stopped {kept}. Go on with: peftkit resume {stage.run.path}"
            raise Interrupted(text, exit_code=error.exit_code) from None
        except Exception as error:
            shortage = _shortage(stage, error)
            if shortage is None:
                raise
        # outside the handler: the traceback held the tensors that were in the way
        checkpoint, _ = stage.run.newest_checkpoint()
        stage = _in_smaller_pieces(stage, shortage, checkpoint)


def _shortage(stage: _Stage, error: Exception) -> oom.Shortage | None:
    """What ran out where, for an out-of-memory error; None for any other."""
    from peftkit.model.hardware import is_out_of_memory, memory_used

    if not is_out_of_memory(error):
        return None
    used = memory_used()
    steps = [event["step"] for event in stage.run.events() if event["event"] == "step"]
    occupied = used.get("peak_allocated_bytes", used.get("resident_bytes", 0))
    return oom.shortage_of(error, step=steps[-1] if steps else None, occupied_bytes=occupied)


def _in_smaller_pieces(stage: _Stage, shortage: oom.Shortage, checkpoint: Path | None) -> _Stage:
    """The stage with a smaller micro-batch, where the recipe allows it. Raises UserError where it stops."""
    from peftkit.model.hardware import release

    release()
    plan = oom.smaller(stage.plan, stage.facts, shortage) if stage.plan.train.on_oom == "adapt" else None
    step = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
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
    write_json(stage.run.path / "plan.json", plan.to_json())
    return replace(stage, plan=plan)


def _go(stage: _Stage, *, checkpoint: Path | None) -> None:
    """Load, wrap, measure, train, measure again, publish the best."""
    from transformers import set_seed

    from peftkit.model import adapter
    from peftkit.model.hardware import memory_used, release, reset_peak
    from peftkit.model.load import load_model
    from peftkit.model.tensors import tensor_bytes
    from peftkit.train import assemble

    plan, run, prepared = stage.plan, stage.run, stage.prepared
    _tell_start(stage)
    set_seed(plan.seed)
    model = load_model(
        stage.source, plan.base, device=plan.device, tell=lambda text: stage.emit("warning", text=text)
    )
    model = adapter.attach(model, plan, stage.tokenizer, eva_batches=_batches(stage))
    adapter.save_start(model, plan, run.path / "adapter_start")
    _tell_parameters(stage, model)
    reset_peak()
    training = assemble(
        model,
        plan,
        stage.tokenizer,
        train=prepared.train,
        held_out=prepared.eval,
        run=run,
        emit=stage.emit,
        checkpoint=checkpoint,
    )
    passed = training.preflight()
    stage.emit("preflight", **asdict(passed), memory=memory_used())
    if checkpoint is None:
        _measure(stage, model, "before")
        training.measure_start()
    else:
        stage.emit("resume", step=int(checkpoint.name.removeprefix("step-")))
    release()
    reset_peak()
    before = memory_used().get("resident_bytes", 0) - tensor_bytes(model)
    step = training.run()
    compared = compare_memory(plan, memory_used(), before)
    if compared is not None:
        stage.emit("memory", **compared)
    if step < (plan.train.num_steps or 0):
        interrupt.stop_if_requested()
    published_step = training.take_best(step)
    _refuse_non_finite(stage, model)
    _measure(stage, model, "after")
    stage.emit("phase", name="publish", detail="adapter" if plan.method.peft else "model")
    target = run.adapter if plan.method.peft else run.model
    with publish_folder(target, step=published_step, base=plan.base.id) as folder:
        adapter.save_result(model, plan, stage.tokenizer, folder, start=run.path / "adapter_start")
    stage.emit("done", step=step, published_step=published_step, result=target.name, memory=memory_used())
    mean = mean_tokens(plan, stage.facts)
    calibrate(run, plan, stage.facts.model.shape, device=stage.facts.device.name, mean_tokens=mean)


def _tell_start(stage: _Stage) -> None:
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


def _refuse_non_finite(stage: _Stage, model: Any) -> None:
    """Nothing that is not a number is ever published."""
    from peftkit.model.adapter import non_finite

    names = non_finite(model)
    if names:
        where = f"{stage.run.path}, train.learning_rate {stage.plan.train.learning_rate:g}"
        got = f"{len(names)} trained tensors with NaN or infinity (for example {names[0]})"
        fix = f"training diverged: try a learning rate of {stage.plan.train.learning_rate / 10:g}"
        raise UserError(Problem(where, got, "finite weights", fix))


def _batches(stage: _Stage) -> list[dict[str, Any]]:
    """A few tokenized rows for initialisations that look at the data (EVA)."""
    import torch

    rows = stage.prepared.train[:64]
    return [
        {"input_ids": torch.tensor([row.input_ids]), "attention_mask": torch.ones(1, len(row.input_ids))}
        for row in rows
    ]


def _tell_parameters(stage: _Stage, model: Any) -> None:
    from peftkit.model import adapter

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


def _measure(stage: _Stage, model: Any, when: str) -> None:
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


def _refuse_changes(stage: _Stage) -> None:
    """Data or a base that changed would make another run of this one."""
    before, now = read_json(stage.run.path / "environment.json")["fingerprints"], stage.fingerprints()
    names = {"data": ", ".join(stage.plan.data.train), "base": stage.plan.base.id}
    problems = [
        Problem(
            names[key],
            f"{key} that changed since the run began",
            "the same as then",
            "restore it, or train anew with peftkit finetune",
        )
        for key in names
        if before[key] != now[key]
    ]
    if problems:
        raise UserError(problems)


def resume(path: Path, *, observer: Observer = lambda event: None) -> Summary:
    """Go on with a run from its newest checkpoint that verifies, or from the start where there is none.

    Raises UserError where there is nothing to go on with, or where data or base changed since.
    """
    run = RunDir.open(path)
    plan = read_plan(run)
    if (run.adapter if plan.method.peft else run.model).exists():
        raise UserError(
            Problem(
                str(path),
                "a run that is finished",
                "an interrupted run",
                "its result stands beside it; train anew with peftkit finetune",
            )
        )
    checkpoint, skipped = run.newest_checkpoint()
    loaded = load(run.path / "resolved.yaml")
    facts, examples = light_facts(loaded)
    base = refuse_where_it_cannot_run(loaded, plan, facts)
    run.drop_cut_event()
    with interrupt.listening():
        for fault in skipped:
            observer({"event": "warning", "text": f"{fault}: passed over"})
        run.set_damaged_aside()
        stage = _open(loaded, facts, examples, base, run, observer)
        spent = max((event.get("at_seconds", 0.0) for event in run.events()), default=0.0)
        stage = replace(stage, plan=plan, started=stage.started - spent)
        _refuse_changes(stage)
        return _train_and_publish(stage, checkpoint=checkpoint)
