"""What happens during training becomes events, checkpoints and, when asked, a clean stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback

from peftkit import interrupt
from peftkit.model.hardware import memory_used
from peftkit.plan import Plan
from peftkit.rundir import RunDir
from peftkit.train.checkpoint import (
    random_states,
    restore_random_states,
    rotate,
    write_checkpoint,
)

Emit = Callable[..., None]


@dataclass
class Progress:
    """What early stopping and the choice of the best checkpoint remember. Stored in each checkpoint."""

    best_loss: float | None = None
    best_step: int | None = None
    num_without_gain: int = 0
    last_step: int = 0  # of the last evaluation

    def note(self, loss: float, step: int, min_delta: float) -> bool:
        """Take in an evaluation loss. Returns whether it is the best so far."""
        self.last_step = step
        if self.best_loss is None or loss < self.best_loss - min_delta:
            self.best_loss, self.best_step, self.num_without_gain = loss, step, 0
            return True
        self.num_without_gain += 1
        return False


class Record(TrainerCallback):
    """Emits step and eval events, writes checkpoints, stops early or on a signal."""

    def __init__(self, run: RunDir, plan: Plan, emit: Emit, progress: Progress) -> None:
        self.run, self.plan, self.emit, self.progress = run, plan, emit, progress
        self.step_started = time.monotonic()
        self.step_seconds = 0.0
        self.num_tokens = 0.0
        self.parts: dict[str, Any] = {}
        self.random_before_evaluation: Any = None
        self.evaluated_step: int | None = None  # for an evaluation outside the Trainer's loop
        self.stopped_early = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._keep(parts)
        self.emit("train_begin", step=state.global_step, num_steps=state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> Any:
        self._keep(parts)
        self.step_seconds = time.monotonic() - self.step_started
        if interrupt.requested():
            self._checkpoint(state)
            control.should_training_stop = True
            control.should_evaluate = False
        elif (
            state.global_step % self.plan.train.checkpoint_steps == 0 and state.global_step < state.max_steps
        ):
            self._checkpoint(state)
        if state.global_step % self.plan.train.eval_steps == 0:
            self.random_before_evaluation = random_states()
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        tokens = float(logs.get("num_tokens", 0.0))
        rate = (tokens - self.num_tokens) / self.step_seconds if self.step_seconds and tokens else None
        self.num_tokens = tokens
        self.emit(
            "step",
            step=state.global_step,
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            step_seconds=round(self.step_seconds, 4),
            tokens_per_second=rate and round(rate, 1),
            memory=memory_used(),
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **parts: Any) -> Any:
        self._keep(parts)
        if self.random_before_evaluation is not None:
            # evaluation draws random numbers: put them back, so that training is the same without it
            restore_random_states(*self.random_before_evaluation)
            self.random_before_evaluation = None
        loss = float(metrics["eval_loss"])
        step = state.global_step if self.evaluated_step is None else self.evaluated_step
        if step == 0:
            self.emit("eval", step=0, loss=loss, best=False)
            return control
        best = self.progress.note(loss, step, self.plan.train.min_delta)
        self.emit("eval", step=step, loss=loss, best=best)
        if best and not self.run.checkpoint(step).exists():
            self._checkpoint(state)
        patience = self.plan.train.patience
        if patience is not None and self.progress.num_without_gain >= patience:
            self.emit("early_stop", step=step, patience=patience)
            control.should_training_stop = self.stopped_early = True
        return control

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if interrupt.requested() and state.global_step > 0 and self.parts:
            self._checkpoint(state)
            interrupt.stop_if_requested("interrupted during evaluation")

    def _keep(self, parts: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "lr_scheduler"):
            if parts.get(name) is not None:
                self.parts[name] = parts[name]

    def _checkpoint(self, state: Any) -> None:
        folder = write_checkpoint(
            self.run,
            model=self.parts["model"],
            optimizer=self.parts["optimizer"],
            scheduler=self.parts["lr_scheduler"],
            state=state,
            progress=asdict(self.progress),
            randoms=self.random_before_evaluation,
        )
        rotate(self.run, self.progress.best_step)
        self.emit("checkpoint", step=state.global_step, path=str(folder.relative_to(self.run.path)))
