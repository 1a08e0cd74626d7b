"""Recording of a training: events, evaluations, checkpoints and, when asked, a clean stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from peftkit import interrupt, ranks
from peftkit.diagnose.statistics import recorded_rows
from peftkit.errors import Interrupted
from peftkit.evaluate.losses import RowLosses
from peftkit.model.hardware import read_memory_use
from peftkit.plan import Plan
from peftkit.plan.packing import num_drawn_rows
from peftkit.rundir import RunDir
from peftkit.rundir.events import (
    CheckpointEvent,
    EarlyStopEvent,
    EvalEvent,
    Observer,
    StepEvent,
    TrainBeginEvent,
    WarningEvent,
)
from peftkit.train.checkpoint.snapshot import take_snapshot
from peftkit.train.checkpoint.writer import CheckpointWriter, CommitResult
from peftkit.train.guard import StepGuard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

Evaluate = Callable[[Any], RowLosses]


@dataclass
class EvalProgress:
    """The state of early stopping and of the search for the best checkpoint. Stored in each checkpoint."""

    best_loss: float | None = None
    best_step: int | None = None
    patience_loss: float | None = None  # what the next loss must beat by min_delta
    num_without_gain: int = 0
    last_step: int = 0  # of the last evaluation
    earlier_loss: float | None = None  # the best before that, whose checkpoint stands until the next is whole
    earlier_step: int | None = None

    def note(self, loss: float, step: int, min_delta: float, *, has_checkpoint: bool = True) -> bool:
        """Add an evaluation loss. Returns True if it is the best so far; NaN never is.

        Without `has_checkpoint` no checkpoint will hold the step's state: it is not the best, whatever its
        loss.
        """
        self.last_step = step
        if self.patience_loss is None or loss < self.patience_loss - min_delta:
            self.patience_loss, self.num_without_gain = loss if math.isfinite(loss) else None, 0
        else:
            self.num_without_gain += 1
        if has_checkpoint and math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.earlier_loss, self.earlier_step = self.best_loss, self.best_step
            self.best_loss, self.best_step = loss, step
            return True
        return False

    def lost(self, step: int) -> None:
        """Make the earlier best the best again: the checkpoint of `step` could not be written."""
        if step == self.best_step:
            self.best_loss, self.best_step = self.earlier_loss, self.earlier_step


_LOSS_DIGITS = 5  # of a row's loss in an event


class Recorder(TrainerCallback):
    """A callback that emits events, evaluates when due, writes checkpoints, stops early or on a signal.

    `evaluate` takes the model and returns the losses of held-out rows; None where there are none. Training
    stops at the plan's diagnosis steps, each with a checkpoint.
    """

    def __init__(
        self,
        plan: Plan,
        emit: Observer,
        progress: EvalProgress,
        evaluate: Evaluate | None,
        *,
        guard: StepGuard,
        run: RunDir,
        facts: Mapping[str, object],
    ) -> None:
        self.plan, self.emit, self.progress, self.guard = plan, emit, progress, guard
        self.evaluate, self.facts = evaluate, facts
        self.writer = CheckpointWriter(run, self._report_commit)
        self.last_saved = 0  # the step whose checkpoint is written, or being written
        self.has_ended = False
        self.checkpoint_due: int | None = None  # from which step on a checkpoint is wanted
        self.accelerator: Any = None  # the trainer's, once there is one
        self.step_start_time = time.monotonic()
        self.step_seconds = 0.0
        self.num_tokens = 0.0
        self.parts: dict[str, Any] = {}

    @property
    def stops_early(self) -> bool:
        """Return True if the recipe's patience is spent."""
        patience = self.plan.train.patience
        return patience is not None and self.progress.num_without_gain >= patience

    def measure(self, model: PreTrainedModel, step: int) -> bool:
        """Evaluate the model and record the loss of `step`. Returns True if it is the best so far."""
        assert self.evaluate is not None
        losses = self.evaluate(model)
        has_checkpoint, loss = self.guard.last_step_ok, losses.mean
        is_best = step > 0 and self.progress.note(loss, step, self.plan.train.min_delta, has_checkpoint=has_checkpoint)
        rows = [round(losses.sums[row], _LOSS_DIGITS) for row in recorded_rows(len(losses.sums))]
        self.emit(EvalEvent(step=step, loss=loss, best=is_best, rows=rows, memory=read_memory_use()))
        if self.stops_early:
            self.emit(EarlyStopEvent(step=step, patience=self.plan.train.patience))
        return is_best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: object
    ) -> None:
        self.parts = {name: parts[name] for name in ("model", "optimizer", "lr_scheduler")} | {"state": state}
        self.num_tokens = float(state.num_input_tokens_seen)  # of the run that this one goes on with
        self.emit(TrainBeginEvent(step=state.global_step, num_steps=state.max_steps))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.has_ended = True

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.step_start_time = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Measure the step, and put averaged weights in the model, where that is what the optimizer trains.

        At each step's end, so that evaluations, checkpoints and resumed runs all see the same. The Trainer takes
        training up from them.
        """
        self.parts["optimizer"].eval()
        self.step_seconds = time.monotonic() - self.step_start_time

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: object
    ) -> Any:
        """Finish a step: emit, check, save, evaluate, stop. The Trainer logs each step right after it."""
        if not logs or "loss" not in logs:
            return control
        state.log_history.clear()  # events.jsonl has it: it would grow without end, in each checkpoint too
        self.writer.poll()
        counted = float(state.num_input_tokens_seen or logs.get("num_tokens") or 0)  # by transformers, or TRL
        tokens = self.guard.num_tokens or counted - self.num_tokens
        self.num_tokens = counted
        rate = tokens / self.step_seconds if self.step_seconds and tokens else None
        self.emit(
            StepEvent(
                step=state.global_step,
                loss=self.guard.loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=float(logs.get("grad_norm", 0.0)),
                step_seconds=round(self.step_seconds, 4),
                tokens_per_second=rate and round(rate, 1),
                memory=read_memory_use(),
            )
        )
        step, is_last = state.global_step, state.global_step >= state.max_steps
        self.guard.check_step(
            step,
            float(logs.get("grad_norm", 0.0)),
            learning_rate=float(logs["learning_rate"]),
            model=self.parts["model"],
        )
        if step % self.plan.train.checkpoint_steps == 0:
            self.checkpoint_due = step
        if self.checkpoint_due is not None and step >= self.checkpoint_due and not is_last:
            self._save_checkpoint(state)
        if self.evaluate is not None and (is_last or step % self.plan.train.eval_steps == 0):
            try:
                is_best = self.measure(self.parts["model"], step)
            except Interrupted:
                self._save_checkpoint(state)
                raise
            if is_best:
                self._save_checkpoint(state)
            if self.stops_early:
                control.should_training_stop = True
        is_end = is_last or control.should_training_stop
        if is_end and self.plan.diagnose.escalate != "off" and self.plan.method.peft is not None:
            self._save_checkpoint(state)  # what an adapter is judged by, now or later
        if step in self.plan.diagnose.look_steps and not is_end and self.guard.last_step_ok:
            self._save_checkpoint(state)
            control.should_training_stop = True
        if interrupt.stop_requested() and not is_last:
            self._save_checkpoint(state)
            control.should_training_stop = True
        return control

    def _save_checkpoint(self, state: Any) -> None:
        """Save this step's state, unless it is saved already or the step was a bad one."""
        step = state.global_step
        if self.last_saved == step or not self.guard.last_step_ok:
            return  # after a bad step the next good one is kept: it stays due
        self.last_saved, self.checkpoint_due = step, None
        scaler = getattr(self.accelerator, "scaler", None)
        snapshot = take_snapshot(
            model=self.parts["model"],
            optimizer=self.parts["optimizer"],
            scheduler=self.parts["lr_scheduler"],
            state=state,
            extra_state={
                "progress": asdict(self.progress),
                "vitals": self.guard.state(),
                "loss_scale": scaler.state_dict() if scaler is not None else None,
            },
            facts={**self.facts, "samples_seen": min(step * self.plan.train.batch_size, num_drawn_rows(self.plan))},
        )
        if ranks.current().is_lead:
            self.writer.submit(snapshot, best_step=self.progress.best_step)

    def _report_commit(self, commit: CommitResult) -> None:
        """Emit the result of writing a checkpoint; after a failure the run continues and retries soon."""
        if commit.error is None:
            self.emit(
                CheckpointEvent(
                    step=commit.step, path=commit.path, seconds=round(commit.seconds, 4), size_bytes=commit.size_bytes
                )
            )
            if commit.rotation_fault:
                text = f"an older checkpoint could not be removed ({commit.rotation_fault})"
                self.emit(WarningEvent(text=text))
            return
        if ranks.current().num > 1:
            raise commit.error  # the others do not know of it: the run stops, and its last checkpoint is whole
        step = int(self.parts["state"].global_step)
        text = f"no checkpoint of step {commit.step} ({commit.error.strerror}): free disk space"
        if self.has_ended:
            self.emit(WarningEvent(text=text))
        else:
            self.checkpoint_due = step + max(1, self.plan.train.checkpoint_steps // 4)
            self.last_saved = 0 if self.last_saved == commit.step else self.last_saved
            self.emit(WarningEvent(text=f"{text}; the run continues, and tries again at step {self.checkpoint_due}"))
        if not (self.has_ended and commit.step == step):  # the last state is in the model still
            self.progress.lost(commit.step)
