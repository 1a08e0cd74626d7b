"""The stations of a training segment, from loading the base to publishing the result.

`run/finetune.py` calls them, in the order of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit import interrupt, ranks
from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.evaluate.scores import compute_metrics
from peftkit.model.adapter import attach
from peftkit.model.adapter.attach import non_finite_tensors
from peftkit.model.adapter.load import load_adapter_tensors
from peftkit.model.base.identity import IDENTITY_FILE
from peftkit.model.hardware import read_memory_use, release_memory, reset_peak_memory
from peftkit.model.load import load_model
from peftkit.plan import Plan
from peftkit.plan.packing import mean_row_tokens
from peftkit.prepare.calibration import calibrate, compare_memory
from peftkit.prepare.context import RunContext, record_weights
from peftkit.recipe.start import adapter_folder
from peftkit.report import Summary
from peftkit.rundir import publish_folder, step_of, write_sealed
from peftkit.rundir.events import (
    DataEvent,
    DoneEvent,
    EvalEvent,
    MetricEvent,
    ParametersEvent,
    PhaseEvent,
    PreflightEvent,
    WarningEvent,
    of_type,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftkit.experiments.look import LookOutcome
    from peftkit.train import Training
    from peftkit.train.preflight import Preflight


@dataclass(frozen=True)
class Segment:
    """A stretch of training between two builds of the model, from a checkpoint or from the start."""

    context: RunContext
    checkpoint: Path | None = None
    base_in_memory: PreTrainedModel | None = None  # the bare base, where the segment before left one
    is_same_adapter: bool = False  # as the segment before had: what it is was told

    def from_newest_checkpoint(self) -> Segment:
        """Return the same, from the newest checkpoint that verifies."""
        newest = ranks.from_lead(lambda: str(self.context.run.newest_checkpoint()[0] or ""))
        return replace(self, checkpoint=Path(newest) if newest else None)


@dataclass(frozen=True)
class Finished:
    """The outcome of the last segment: the result is published."""

    summary: Summary


def load_base(segment: Segment) -> PreTrainedModel:
    """Load the base model, or take the one in memory; a fresh load reports the data first."""
    from transformers import set_seed

    context, plan = segment.context, segment.context.plan
    if segment.base_in_memory is None:
        prepared = context.prepared
        context.emit(
            DataEvent(
                num_train=len(prepared.train),
                num_eval=len(prepared.eval),
                num_tokens=prepared.num_tokens,
                num_learnt=prepared.num_learnt,
                num_dropped=prepared.truncation.num_dropped,
                num_cut=prepared.truncation.num_cut,
                default_template=prepared.uses_default_template,
                chats=context.prepared_data.chats,
            )
        )
        if plan.base.trust_remote_code:
            text = f"code that comes with {plan.base.id} is run, as the recipe allows"
            context.emit(WarningEvent(text=text))
        start = f", going on from {Path(plan.method.start_from).name}" if plan.method.start_from else ""
        context.emit(PhaseEvent(name="model", detail=f"{plan.method.name}{start}"))
    interrupt.stop_if_requested()
    set_seed(plan.seed)
    model = segment.base_in_memory or load_model(
        context.source, plan.base, device=plan.device, on_warning=lambda text: context.emit(WarningEvent(text=text))
    )
    interrupt.stop_if_requested()
    if ranks.current().is_lead:
        record_weights(context)
    return model


def attach_adapter(segment: Segment, model: PreTrainedModel) -> PreTrainedModel:
    """Wrap the model with a new adapter of the plan, save its initial state, and report the counted parameters.

    A checkpoint's weights come later, with the optimizer's state: `assemble_training`.
    """
    from peftkit.train.batches import eva_batches

    context, plan, run = segment.context, segment.context.plan, segment.context.run
    batches = eva_batches(plan, context.prepared.train, pad_id=context.tokenizer.pad_token_id)
    model = attach.attach_adapter(model, plan, context.tokenizer, eva_batches=batches)
    is_new = segment.checkpoint is None and not run.adapter.exists()
    if ranks.current().is_lead:
        attach.save_initial_adapter(model, plan, run.path / "adapter_start", overwrite=is_new)
    num_trainable, num_total = attach.count_parameters(model)
    if not segment.is_same_adapter:
        context.emit(
            ParametersEvent(
                num_trainable=num_trainable,
                num_total=num_total,
                by_role=attach.trainable_by_role(model, plan),
                num_planned=plan.method.num_trainable,
            )
        )
    if num_trainable == 0:
        raise PeftkitError("nothing would be trained: no parameter of the model is trainable")
    return model


def assemble_training(segment: Segment, model: PreTrainedModel) -> Training:
    """Assemble trainer and callbacks, and the restoring of the checkpoint or of the adapter that is trained on.

    Training stops at the looks that are still due.
    """
    from peftkit.experiments.look import is_look_due
    from peftkit.train import assemble

    context, plan = segment.context, segment.context.plan
    reset_peak_memory()
    steps = plan.diagnose.look_steps
    look_steps = tuple(ranks.from_lead(lambda: [step for step in steps if is_look_due(context, step, at_end=False)]))
    training = assemble(
        model,
        replace(plan, diagnose=replace(plan.diagnose, look_steps=look_steps)),
        context.tokenizer,
        prepared=context.prepared,
        run=context.run,
        emit=context.emit,
        checkpoint=segment.checkpoint,
        facts={"fingerprints": context.fingerprints(), "num_rollbacks": len(plan.train.rollbacks)},
    )
    if plan.method.start_from is not None and segment.checkpoint is None:
        # after the trainer was made: over 4 bit TRL's rounds the adapter to 16 bits
        load_adapter_tensors(model, adapter_folder(Path(plan.method.start_from), "start_from"))
    return training


def run_preflight(segment: Segment, training: Training) -> Preflight:
    """Run one forward and backward on the longest rows; see `train/preflight.py`."""
    preflight = training.preflight()
    if not segment.is_same_adapter:
        segment.context.emit(PreflightEvent(**asdict(preflight), memory=read_memory_use()))
    interrupt.stop_if_requested()
    return preflight


def plan_of_lead(decide: Callable[..., Plan], *arguments: object) -> Plan:
    """Return the plan that the lead decides on from `arguments`, on every rank."""
    if ranks.current().num == 1:
        return decide(*arguments)
    return Plan.from_json(ranks.from_lead(lambda: decide(*arguments).to_json()))


def segment_after_rate_search(context: RunContext, model: PreTrainedModel) -> Segment:
    """Search for the learning rate, and return the segment that trains at it, from the start.

    The lead searches, on the model that all ranks hold alike.
    """
    from peftkit.experiments.rates import search_learning_rate
    from peftkit.experiments.rewrap import unwrap_base

    plan = plan_of_lead(search_learning_rate, context, model)
    return Segment(replace(context, plan=plan), base_in_memory=unwrap_base(context, model), is_same_adapter=True)


def train_to_next_look(
    context: RunContext, training: Training, model: PreTrainedModel, checkpoint: Path | None, preflight: Preflight
) -> int:
    """Train to the next look or the end, compare measured with predicted memory, and return the step.

    Returns at once where the checkpoint's own look is still due: the process was killed before it.
    """
    from peftkit.experiments.look import is_look_due
    from peftkit.model.meta.tensors import count_tensor_bytes, optimizer_bytes

    if checkpoint is not None and ranks.from_lead(lambda: is_look_due(context, step_of(checkpoint), at_end=False)):
        return step_of(checkpoint)
    release_memory()
    reset_peak_memory()
    baseline_bytes = read_memory_use().get("resident_bytes", 0) - count_tensor_bytes(model)
    with interrupt.deferred() if ranks.current().num > 1 else nullcontext():  # all stop after the same step
        step = training.run()
    if context.plan.memory is not None and training.trainer.optimizer is not None:
        use, state_bytes = read_memory_use(), optimizer_bytes(training.trainer.optimizer)
        context.emit(compare_memory(context.plan.memory, use, baseline_bytes, preflight.peak_bytes, state_bytes))
    return step


def diagnose_if_due(context: RunContext, training: Training, *, step: int, at_end: bool) -> LookOutcome | None:
    """Look at the run where a look is due at this step: is quality lagging, and why. None where none is due.

    The lead looks. To the others it is as if they had: the plan that is left, and their own model.
    """
    from peftkit.experiments.look import LookOutcome, is_look_due, try_look

    if not ranks.from_lead(lambda: is_look_due(context, step, at_end=at_end)):
        return None
    outcome = try_look(context, training, step=step, at_end=at_end) if ranks.current().is_lead else None
    left = ranks.from_lead(lambda: outcome and [outcome.plan.to_json(), outcome.is_rewrapped])
    if outcome is None:
        plan = Plan.from_json(left[0])
        outcome = LookOutcome(None, plan, training.trainer.model, context.plan, is_rewrapped=left[1])
    return outcome


def segment_after_look(look: LookOutcome, context: RunContext, training: Training) -> Segment:
    """Return the segment after a look: the plan that it left, the base unwrapped, the trainer freed."""
    from peftkit.experiments.rewrap import unwrap_base

    base_in_memory = None
    if look.model is not None:
        base_in_memory = unwrap_base(replace(context, plan=look.wrapped_plan), look.model)
    training.trainer = None  # its optimizer holds what was trained until here
    release_memory()
    is_same_adapter = look.plan.method == context.plan.method
    return Segment(replace(context, plan=look.plan), base_in_memory=base_in_memory, is_same_adapter=is_same_adapter)


def refuse_non_finite(context: RunContext, model: PreTrainedModel) -> None:
    """Raise UserError for trained tensors that are not finite: nothing of them is ever published."""
    names = non_finite_tensors(model)
    if names:
        rate = context.plan.train.learning_rate
        where = f"{context.run.path}, train.learning_rate {rate:g}"
        got = f"{len(names)} trained tensors with NaN or infinity (for example {names[0]})"
        fix = f"training diverged: try a learning rate of {rate / 10:g}"
        raise UserError(Problem(where, got, "finite weights", fix))


def report_metric(context: RunContext, model: PreTrainedModel, when: str) -> None:
    """Compute the recipe's metric on held-out examples, before or after training, and emit it. The lead does it."""
    options = context.plan.evaluate
    if options.metric is None or not context.prepared.eval_examples:
        return
    ranks.from_lead(lambda: _emit_metric(context, model, when))


def _emit_metric(context: RunContext, model: PreTrainedModel, when: str) -> None:
    options = context.plan.evaluate
    assert options.metric is not None
    context.emit(PhaseEvent(name="metric", detail=f"{options.metric} {when} training"))
    metrics = compute_metrics(
        model,
        context.tokenizer,
        context.plan,
        context.prepared.eval_examples[: options.max_examples],
        context.prepared.eval[: options.max_examples],
    )
    context.emit(
        MetricEvent(
            when=when,
            name=options.metric,
            value=metrics.scores[options.metric],
            scores=metrics.scores,
            num_examples=metrics.num_examples,
            samples=metrics.samples,
            memory=read_memory_use(),
        )
    )


_WORSE = 1.001  # of the loss before training: less is rounding


def publish(context: RunContext, model: PreTrainedModel, *, step: int, published_step: int) -> None:
    """Publish the result with the fingerprints of what it was trained on, and calibrate later predictions."""
    plan, run = context.plan, context.run
    losses = {event.step: event.loss for event in of_type(run.events(), EvalEvent)}
    before, after = losses.get(0), losses.get(published_step)
    if before is not None and after is not None and after > _WORSE * before:
        start = Path(plan.method.start_from).name if plan.method.start_from else "the base"
        text = f"the result is worse than {start} on the held-out rows: evaluation loss {before:.4f} -> {after:.4f}; "
        text += f"train.learning_rate was {plan.train.learning_rate:g}: try {plan.train.learning_rate / 10:g}"
        context.emit(WarningEvent(text=text))
    context.emit(PhaseEvent(name="publish", detail="adapter" if plan.method.peft else "model"))
    result = run.adapter if plan.method.peft else run.model
    with publish_folder(result, step=published_step, base=plan.base.id) as folder:
        attach.save_trained(model, plan, context.tokenizer, folder, initial_adapter=run.path / "adapter_start")
        write_sealed(folder / IDENTITY_FILE, {"step": published_step, **context.fingerprints()})
    context.emit(DoneEvent(step=step, published_step=published_step, result=result.name, memory=read_memory_use()))
    mean_length = mean_row_tokens(plan, context.facts)
    calibrate(run, plan, context.facts.model.shape, device=context.facts.device.name, mean_tokens=mean_length)
