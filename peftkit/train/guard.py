"""Step guard: a step that is not finite is never taken, a loss spike is reported with its rows.

A step whose loss or gradients are not finite is skipped: its gradients are dropped before the optimizer sees
them. The recipe's train.on_spike decides what several such steps or spikes in a row lead to.
"""

from __future__ import annotations

import math
import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from peftkit import interrupt, ranks
from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.model.adapter.attach import trainable_tensors
from peftkit.plan import Plan
from peftkit.rundir.events import Observer, SpikeEvent, WarningEvent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

MEDIAN_WINDOW = 64  # losses that a median is taken of
MIN_MEDIAN_LOSSES = 16  # of them, before there is one
SPIKE_DEVIATIONS = 16.0  # robust ones, above the lowest median
_MIN_LOSSES = 3  # losses, before anything at all is called a spike
MAX_BAD_STEPS = 3  # bad steps that lead to more than a line
MAX_SKIPPED_STEPS = 25  # in a row, where the recipe only skips
_MOVEMENT_STEPS = 3  # with a learning rate, before everything has moved
_MAX_SHOWN_ROWS = 6
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class LossHistory:
    """Recent losses and counts of bad steps. Stored in each checkpoint."""

    losses: list[float] = field(default_factory=list)  # the last good ones
    start_loss: float | None = None  # the median of the first ones
    lowest_loss: float | None = None  # the lowest median so far: a slow climb leaves it behind
    num_bad: int = 0  # in a row
    num_skipped: int = 0
    num_scaled: int = 0  # in a row: gradients that only fp16's loss scale may have made infinite

    def explain_spike(self, loss: float) -> str:
        """Return why a finite loss is a spike, in words; empty where it is none.

        With median m of the last MEDIAN_WINDOW losses, m_low the lowest and m_start the first such median,
        and s = 1.4826 / sqrt(2) * median |l_i+1 - l_i| (differences between steps, which a trend leaves
        alone):

            spike if l - m_low > max(16 s, 0.5 (m_start - m_low), 0.5 |m_low|)

        so that a few outliers or a slow climb do not hide the next spike, and half of the progress since the
        start has to be lost. Before MIN_MEDIAN_LOSSES losses: a loss above 4 times the highest of at least 3.
        Example: m_start = 3.0, m_low = 1.0, s = 0.02: limit max(0.32, 1.0, 0.5) = 1.0, so a loss above 2.0 is
        a spike.
        """
        if self.start_loss is None or self.lowest_loss is None:
            highest = max(self.losses, default=math.inf)
            is_spike = len(self.losses) >= _MIN_LOSSES and loss > 4 * highest
            return f"a loss of {loss:.3f} after at most {highest:.3f} since the start" if is_spike else ""
        # of differences from step to step, which a trend leaves alone
        spread = 1.4826 / math.sqrt(2) * statistics.median(abs(b - a) for a, b in pairwise(self.losses))
        rise = loss - self.lowest_loss
        gain = self.start_loss - self.lowest_loss
        if rise <= max(SPIKE_DEVIATIONS * spread, 0.5 * gain, 0.5 * abs(self.lowest_loss)):
            return ""
        return f"a loss of {loss:.3f} after {self.lowest_loss:.3f}, the lowest median so far"

    def note(self, loss: float) -> None:
        """Add a good step's loss."""
        self.losses = [*self.losses, loss][-MEDIAN_WINDOW:]
        if len(self.losses) >= MIN_MEDIAN_LOSSES:
            median = statistics.median(self.losses)
            self.start_loss = median if self.start_loss is None else self.start_loss
            self.lowest_loss = median if self.lowest_loss is None else min(median, self.lowest_loss)


@dataclass
class MicroBatchLoss:
    """A micro-batch of the current step: the numbers of its rows and its share of the loss."""

    rows: Any
    loss: torch.Tensor


class StepGuard(TrainerCallback):
    """A callback that skips steps that are not finite, and checks each step once its loss is known.

    `row_names` returns the places of rows from their numbers, `emit` writes events.
    """

    def __init__(
        self, plan: Plan, emit: Observer, history: LossHistory, row_names: Callable[[Sequence[int]], list[str]]
    ) -> None:
        self.plan, self.emit, self.history, self.names = plan, emit, history, row_names
        self.seen: list[MicroBatchLoss] = []
        self.loss = 0.0  # of the step: the Trainer's own number stays NaN once it was
        self.num_tokens = 0.0  # of the step, where the trainer counts them
        self.skipped = False
        self.initial_sums: dict[str, float] = {}
        self.num_moving_steps = 0

    @property
    def last_step_ok(self) -> bool:
        """Return True if the last step was a good one, whose state may be saved."""
        return self.history.num_bad == 0

    def add_loss(self, rows: object, loss: torch.Tensor, num_tokens: int = 0) -> None:
        """Add the loss of a micro-batch of the current step, and its tokens."""
        self.seen.append(MicroBatchLoss(rows, loss.detach()))
        self.num_tokens += num_tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: object = None, **_: object
    ) -> None:
        self.initial_sums = {name: _sum(tensor) for name, tensor in trainable_tensors(model).items()}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.seen, self.skipped, self.num_tokens = [], False, 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: object
    ) -> None:
        """Drop the step's gradients unless all are finite; clipping spreads one that is not, or leaves it.

        What one rank saw, and whether one was asked to stop, all know from here on. The Trainer multiplies the loss of
        a rank by their number, as DDP takes the mean of the gradients.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        values = torch.stack([norm, *(micro_batch.loss.to(norm) for micro_batch in self.seen)])
        is_bad = not bool(values.isfinite().all())
        loss = float(sum(micro_batch.loss for micro_batch in self.seen))
        num_bad, loss_sum, self.num_tokens, *signals = ranks.total(
            [is_bad, loss, self.num_tokens, *(interrupt.noted_signal() == number for number in _SIGNALS)]
        )
        self.skipped, self.loss = num_bad > 0, loss_sum / ranks.current().num
        for number, num_ranks in zip(_SIGNALS, signals, strict=True):
            if num_ranks:
                interrupt.request_stop(number)
        if self.skipped:
            for parameter in model.parameters():
                parameter.grad = None

    def check_step(self, step: int, grad_norm: float, *, learning_rate: float, model: PreTrainedModel) -> None:
        """Check a finished step. Raises Diverged to roll back, UserError to stop."""
        loss = self.loss
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        is_scaling = self.plan.train.autocast == "fp16" and math.isfinite(loss)
        self.history.num_scaled = 0 if is_finite else self.history.num_scaled + 1
        if not is_finite and is_scaling and self.history.num_scaled < MAX_SKIPPED_STEPS:
            return  # the loss scale of fp16 finds its place
        message = self.history.explain_spike(loss) if is_finite else ""
        if not is_finite:
            value_text = f"a loss of {loss}" if not math.isfinite(loss) else f"a gradient norm of {grad_norm}"
            # a norm beyond what a float holds, of gradients within it: clipping has made nothing of them
            outcome = "the step was skipped" if self.skipped else "its gradients were clipped to zero"
            message = f"{value_text}: {outcome}"
        if not message:
            self.history.note(loss)
            self.history.num_bad = 0
            if self.initial_sums and learning_rate:
                self.num_moving_steps += 1
                if self.num_moving_steps == _MOVEMENT_STEPS:
                    unmoved = [n for n, t in trainable_tensors(model).items() if _sum(t) == self.initial_sums[n]]
                    if len(unmoved) == len(self.initial_sums):
                        got = f"{len(unmoved)} trained tensors that have not moved by step {step}"
                        rate = self.plan.train.learning_rate
                        fix = f"train.learning_rate is {rate:g}: is it too small to change a weight?"
                        raise UserError(Problem("train", got, "training that changes the trained tensors", fix))
                    if unmoved:
                        examples = ", ".join(unmoved[:2])
                        text = f"{len(unmoved)} trained tensors have not moved by step {step} (for example {examples})"
                        self.emit(WarningEvent(text=text))
                    self.initial_sums = {}
            return
        self.history.num_bad += 1
        self.history.num_skipped += self.skipped
        # the rows of the worst micro-batches; of all, where the loss does not tell
        own_batches = [(float(micro_batch.loss), micro_batch.rows.tolist()) for micro_batch in self.seen]
        batches = [batch for of_rank in ranks.gathered(own_batches) for batch in of_rank]
        bad_rows = [rows for loss, rows in batches if not math.isfinite(loss)]
        if not bad_rows and batches and not self.skipped:
            bad_rows = [max(batches)[1]]
        numbers = [int(row) for rows in bad_rows or [rows for _, rows in batches] for row in rows]
        remainder = [f"and {len(numbers) - _MAX_SHOWN_ROWS} more"] if len(numbers) > _MAX_SHOWN_ROWS else []
        rows = self.names(numbers[:_MAX_SHOWN_ROWS]) + remainder
        if is_finite and self.plan.train.on_spike == "skip":  # told, and then taken as it is
            self.history.note(loss)
            self.history.num_bad = 0
        self.emit(
            SpikeEvent(
                step=step,
                text=message,
                skipped=self.skipped,
                num_in_a_row=self.history.num_bad,
                num_skipped=self.history.num_skipped,
                rows=rows,
                advice=ADVICE,
            )
        )
        # apply the recipe's train.on_spike to bad steps in a row
        num_bad, policy = self.history.num_bad, self.plan.train.on_spike
        first_step = step - num_bad + 1
        if policy == "rollback" and num_bad >= MAX_BAD_STEPS:
            raise Diverged(f"{num_bad} bad steps in a row, from step {first_step} on: {message}", first_step=first_step)
        limit = {"stop": MAX_BAD_STEPS if is_finite else 1, "skip": MAX_SKIPPED_STEPS}.get(policy, MAX_BAD_STEPS)
        if num_bad >= limit and not (policy == "skip" and is_finite):
            raise UserError(divergence_problem(self.plan, f"step {step}: {message}", rows))

    def state(self) -> dict[str, Any]:
        """Return the loss history as a dict, for a checkpoint."""
        return asdict(self.history)


def loss_listener(callbacks: Sequence[object]) -> Callable[[Any, torch.Tensor, int], None]:
    """Return the guard's `add_loss` from the callbacks, or a function that does nothing."""
    return next(
        (callback.add_loss for callback in callbacks if isinstance(callback, StepGuard)), lambda rows, loss, num: None
    )


def _sum(tensor: torch.Tensor) -> float:
    return float(tensor.detach().sum(dtype=torch.float64))


ADVICE = "lower the learning rate, warm up for 5-10 % of the steps, clip at 1.0, or inspect these rows"


class Diverged(PeftkitError):
    """Training diverged at `first_step`, and the recipe says to roll back and lower the learning rate."""

    def __init__(self, message: str, *, first_step: int) -> None:
        self.first_step = first_step
        super().__init__(message)


def divergence_problem(plan: Plan, message: str, rows: Sequence[str]) -> Problem:
    """Return the problem that tells the user of a diverged training."""
    where = f"train.learning_rate {plan.train.learning_rate:g}"
    rows_text = f" (rows {', '.join(rows)})" if rows else ""
    return Problem(where, f"{message}{rows_text}", "finite values and a falling loss", ADVICE)
