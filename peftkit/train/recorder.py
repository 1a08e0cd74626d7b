"""What happens during training becomes events, evaluations, checkpoints and, when asked, a clean stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback

from peftkit import interrupt
from peftkit.diagnose.statistics import judged
from peftkit.errors import Interrupted
from peftkit.evaluate.losses import RowLosses
from peftkit.model.hardware import memory_used
from peftkit.plan import Plan
from peftkit.rundir import RunDir
from peftkit.train.checkpoint.snapshot import take_snapshot
from peftkit.train.checkpoint.writer import Commit, Writer
from peftkit.train.guard import Guard

Emit = Callable[..., None]
Evaluate = Callable[[Any], RowLosses]


@dataclass
class Progress:
    """What early stopping and the choice of the best checkpoint remember. Stored in each checkpoint."""

    best_loss: float | None = None
    best_step: int | None = None
    patience_loss: float | None = None  # what the next loss must beat by min_delta
    num_without_gain: int = 0
    last_step: int = 0  # of the last evaluation
    earlier_loss: float | None = None  # the best before that, whose checkpoint stands until the next is whole
    earlier_step: int | None = None

    def note(self, loss: float, step: int, min_delta: float, *, kept: bool = True) -> bool:
        """Take in an evaluation loss. Returns whether it is the best so far; NaN never is.

        Without `kept` no checkpoint will hold the step's state: it is not the best, whatever its loss.
        """
        self.last_step = step
        if self.patience_loss is None or loss < self.patience_loss - min_delta:
            self.patience_loss, self.num_without_gain = loss if math.isfinite(loss) else None, 0
        else:
            self.num_without_gain += 1
        if kept and math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.earlier_loss, self.earlier_step = self.best_loss, self.best_step
            self.best_loss, self.best_step = loss, step
            return True
        return False

    def lost(self, step: int) -> None:
        """The checkpoint of a step could not be written: the best before it is the best again."""
        if step == self.best_step:
            self.best_loss, self.best_step = self.earlier_loss, self.earlier_step


_DIGITS = 5  # of a row's loss in an event


class Record(TrainerCallback):
    """Emits events, evaluates when due, writes checkpoints, stops early or on a signal.

    `evaluate` takes the model and returns the losses of held-out rows; None where there are none.
    Training stops at the plan's looks, each with a checkpoint.
    """

    def __init__(
        self,
        plan: Plan,
        emit: Emit,
        progress: Progress,
        evaluate: Evaluate | None,
        *,
        guard: Guard,
        run: RunDir,
        facts: Mapping[str, Any],
    ) -> None:
        self.plan, self.emit, self.progress, self.guard = plan, emit, progress, guard
        self.evaluate, self.facts = evaluate, facts
        self.writer = Writer(run, self._tell_commit)
        self.last_saved = 0  # the step whose checkpoint is written, or being written
        self.has_ended = False
        self.due: int | None = None  # from which step on a checkpoint is wanted
        self.accelerator: Any = None  # the trainer's, once there is one
        self.step_started = time.monotonic()
        self.step_seconds = 0.0
        self.num_tokens = 0.0
        self.parts: dict[str, Any] = {}

    @property
    def stops_early(self) -> bool:
        """Whether the recipe's patience is spent."""
        patience = self.plan.train.patience
        return patience is not None and self.progress.num_without_gain >= patience

    def measure(self, model: Any, step: int) -> bool:
        """Evaluate and record the loss for `step`. Returns whether it is the best so far."""
        assert self.evaluate is not None
        each = self.evaluate(model)
        kept, loss = self.guard.steady, each.mean
        best = step > 0 and self.progress.note(loss, step, self.plan.train.min_delta, kept=kept)
        rows = [round(each.sums[row], _DIGITS) for row in judged(len(each.sums))]
        self.emit("eval", step=step, loss=loss, best=best, rows=rows, memory=memory_used())
        if self.stops_early:
            self.emit("early_stop", step=step, patience=self.plan.train.patience)
        return best

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.parts = {name: parts[name] for name in ("model", "optimizer", "lr_scheduler")} | {"state": state}
        self.num_tokens = float(state.num_input_tokens_seen)  # of the run that this one goes on with
        self.emit("train_begin", step=state.global_step, num_steps=state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.has_ended = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_seconds = time.monotonic() - self.step_started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> Any:
        """The Trainer logs each step right after it: here the step is complete."""
        if not logs or "loss" not in logs:
            return control
        state.log_history.clear()  # events.jsonl has it: it would grow without end, in each checkpoint too
        self.writer.poll()
        self._tell_step(state, logs)
        step, last = state.global_step, state.global_step >= state.max_steps
        self.guard.judge(
            step,
            float(logs.get("grad_norm", 0.0)),
            learning_rate=float(logs["learning_rate"]),
            model=self.parts["model"],
        )
        if step % self.plan.train.checkpoint_steps == 0:
            self.due = step
        if self.due is not None and step >= self.due and not last:
            self._checkpoint(state)
        if self.evaluate is not None and (last or step % self.plan.train.eval_steps == 0):
            try:
                best = self.measure(self.parts["model"], step)
            except Interrupted:
                self._checkpoint(state)
                raise
            if best:
                self._checkpoint(state)
            if self.stops_early:
                control.should_training_stop = True
        ends = last or control.should_training_stop
        if ends and self.plan.diagnose.escalate != "off" and self.plan.method.peft is not None:
            self._checkpoint(state)  # what an adapter is judged by, now or later
        if step in self.plan.diagnose.look_steps and not ends and self.guard.steady:
            self._checkpoint(state)
            control.should_training_stop = True
        if interrupt.requested() and not last:
            self._checkpoint(state)
            control.should_training_stop = True
        return control

    def _tell_step(self, state: Any, logs: Any) -> None:
        tokens = float(state.num_input_tokens_seen or logs.get("num_tokens") or 0)
        rate = (tokens - self.num_tokens) / self.step_seconds if self.step_seconds and tokens else None
        self.num_tokens = tokens
        self.emit(
            "step",
            step=state.global_step,
            loss=self.guard.loss,
            learning_rate=float(logs["learning_rate"]),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            step_seconds=round(self.step_seconds, 4),
            tokens_per_second=rate and round(rate, 1),
            memory=memory_used(),
        )

    def _checkpoint(self, state: Any) -> None:
        """Keep this step's state, unless it is kept already or the step was a bad one."""
        step = state.global_step
        if self.last_saved == step or not self.guard.steady:
            return  # after a bad step the next good one is kept: it stays due
        self.last_saved, self.due = step, None
        scaler = getattr(self.accelerator, "scaler", None)
        snapshot = take_snapshot(
            model=self.parts["model"],
            optimizer=self.parts["optimizer"],
            scheduler=self.parts["lr_scheduler"],
            state=state,
            own={
                "progress": asdict(self.progress),
                "vitals": self.guard.state(),
                "loss_scale": scaler.state_dict() if scaler is not None else None,
            },
            facts={**self.facts, "samples_seen": step * self.plan.train.batch_size},
        )
        self.writer.submit(snapshot, best_step=self.progress.best_step)

    def _tell_commit(self, commit: Commit) -> None:
        """A checkpoint is written, or could not be: then the run goes on, and tries again soon."""
        if commit.error is None:
            self.emit(
                "checkpoint",
                step=commit.step,
                path=commit.path,
                seconds=round(commit.seconds, 4),
                size_bytes=commit.size_bytes,
            )
            if commit.rotation_fault:
                text = f"an older checkpoint could not be removed ({commit.rotation_fault})"
                self.emit("warning", text=text)
            return
        step = int(self.parts["state"].global_step)
        text = f"no checkpoint of step {commit.step} ({commit.error.strerror}): make room"
        if self.has_ended:
            self.emit("warning", text=text)
        else:
            self.due = step + max(1, self.plan.train.checkpoint_steps // 4)
            self.last_saved = 0 if self.last_saved == commit.step else self.last_saved
            self.emit("warning", text=f"{text}; the run goes on, and tries again at step {self.due}")
        if not (self.has_ended and commit.step == step):  # the last state is in the model still
            self.progress.lost(commit.step)
