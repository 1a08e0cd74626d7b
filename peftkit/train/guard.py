"""Watches the numbers of each step: what is not finite is never stepped on, a spike is told with its rows.

A step whose loss or gradients are not finite is skipped: its gradients are dropped before the optimizer sees
them. What a run of such steps, or of spikes, leads to is the recipe's choice (train.on_spike).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.model.adapter.attach import trainable_tensors
from peftkit.plan import Plan

WINDOW = 64  # losses that a median is taken of
ENOUGH = 16  # of them, before there is one
DEVIATIONS = 16.0  # robust ones, above the lowest median
_FEW = 3  # losses, before anything at all is called a spike
IN_A_ROW = 3  # bad steps that lead to more than a line
MOST_SKIPPED = 25  # in a row, where the recipe only skips
_STEPS_TO_MOVE = 3  # with a learning rate, before everything has moved
_SHOWN_ROWS = 6


@dataclass
class Vitals:
    """What the guard remembers. Stored in each checkpoint."""

    losses: list[float] = field(default_factory=list)  # the last good ones
    start_loss: float | None = None  # the median of the first ones
    lowest_loss: float | None = None  # the lowest median so far: a slow climb leaves it behind
    num_bad: int = 0  # in a row
    num_skipped: int = 0
    num_scaled: int = 0  # in a row: gradients that only fp16's loss scale may have made infinite

    def spike(self, loss: float) -> str:
        """Why a finite loss is a spike, in words; empty where it is none.

        It has to stand out from the lowest median so far by many robust deviations, so that a few outliers or
        a slow climb do not hide the next, and to give back half of what was learnt since the start.
        """
        if self.start_loss is None or self.lowest_loss is None:
            highest = max(self.losses, default=math.inf)
            far = len(self.losses) >= _FEW and loss > 4 * highest
            return f"a loss of {loss:.3f} after at most {highest:.3f} since the start" if far else ""
        # of differences from step to step, which a trend leaves alone
        spread = 1.4826 / math.sqrt(2) * statistics.median(abs(b - a) for a, b in pairwise(self.losses))
        lost = loss - self.lowest_loss
        learnt = self.start_loss - self.lowest_loss
        if lost <= max(DEVIATIONS * spread, 0.5 * learnt, 0.5 * abs(self.lowest_loss)):
            return ""
        return f"a loss of {loss:.3f} after {self.lowest_loss:.3f}, the lowest median so far"

    def note(self, loss: float) -> None:
        """Take in a good step's loss."""
        self.losses = [*self.losses, loss][-WINDOW:]
        if len(self.losses) >= ENOUGH:
            middle = statistics.median(self.losses)
            self.start_loss = middle if self.start_loss is None else self.start_loss
            self.lowest_loss = middle if self.lowest_loss is None else min(middle, self.lowest_loss)


@dataclass
class Seen:
    """A micro-batch of the step: the numbers of its rows and its share of the loss."""

    rows: Any
    loss: torch.Tensor


class Guard(TrainerCallback):
    """Skips steps that are not finite, and judges each step once its loss is known.

    `names` gives the places of rows from their numbers, `emit` writes events.
    """

    def __init__(
        self,
        plan: Plan,
        emit: Callable[..., None],
        vitals: Vitals,
        names: Callable[[Sequence[int]], list[str]],
    ) -> None:
        self.plan, self.emit, self.vitals, self.names = plan, emit, vitals, names
        self.seen: list[Seen] = []
        self.skipped = False
        self.starts: dict[str, float] = {}
        self.num_moving = 0

    @property
    def steady(self) -> bool:
        """Whether the last step was a good one: a state to keep."""
        return self.vitals.num_bad == 0

    @property
    def loss(self) -> float:
        """Of the step: the Trainer's own number stays NaN once it was."""
        return float(sum(seen.loss for seen in self.seen))

    def saw(self, rows: Any, loss: torch.Tensor) -> None:
        """Hear of a micro-batch of the step that is being made."""
        self.seen.append(Seen(rows, loss.detach()))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.starts = {name: _sum(tensor) for name, tensor in trainable_tensors(model).items()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen, self.skipped = [], False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """After clipping: one gradient that is not finite has made all of them so, or its own stays."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        numbers = torch.stack([norm, *(seen.loss.to(norm) for seen in self.seen)])
        self.skipped = not bool(numbers.isfinite().all())
        if self.skipped:
            for parameter in model.parameters():
                parameter.grad = None

    def judge(self, step: int, grad_norm: float, *, learning_rate: float, model: Any) -> None:
        """Take in a finished step. Raises Diverged to go back, UserError to stop."""
        loss = self.loss
        fine = math.isfinite(loss) and math.isfinite(grad_norm)
        scaling = self.plan.train.autocast == "fp16" and math.isfinite(loss)
        self.vitals.num_scaled = 0 if fine else self.vitals.num_scaled + 1
        if not fine and scaling and self.vitals.num_scaled < MOST_SKIPPED:
            return  # the loss scale of fp16 finds its place
        said = self.vitals.spike(loss) if fine else self._not_finite(loss, grad_norm)
        if not said:
            self.vitals.note(loss)
            self.vitals.num_bad = 0
            self._watch_moves(step, learning_rate, model)
            return
        self.vitals.num_bad += 1
        self.vitals.num_skipped += self.skipped
        rows = self._rows()
        if fine and self.plan.train.on_spike == "skip":  # told, and then taken as it is
            self.vitals.note(loss)
            self.vitals.num_bad = 0
        self.emit(
            "spike",
            step=step,
            text=said,
            skipped=self.skipped,
            num_in_a_row=self.vitals.num_bad,
            num_skipped=self.vitals.num_skipped,
            rows=rows,
            advice=ADVICE,
        )
        self._act(step, said, rows, fine=fine)

    def _act(self, step: int, said: str, rows: Sequence[str], *, fine: bool) -> None:
        """What the recipe wants of bad steps in a row."""
        number, chosen = self.vitals.num_bad, self.plan.train.on_spike
        first = step - number + 1
        if chosen == "rollback" and number >= IN_A_ROW:
            raise Diverged(f"{number} bad steps in a row, from step {first} on: {said}", first_step=first)
        limit = {"stop": IN_A_ROW if fine else 1, "skip": MOST_SKIPPED}.get(chosen, IN_A_ROW)
        if number >= limit and not (chosen == "skip" and fine):
            raise UserError(divergence(self.plan, f"step {step}: {said}", rows))

    def _not_finite(self, loss: float, grad_norm: float) -> str:
        what = f"a loss of {loss}" if not math.isfinite(loss) else f"a gradient norm of {grad_norm}"
        # a norm beyond what a float holds, of gradients within it: clipping has made nothing of them
        done = "the step was skipped" if self.skipped else "its gradients were clipped to nothing"
        return f"{what}: {done}"

    def _rows(self) -> list[str]:
        """Where the rows of the worst micro-batches stand; of all, where the loss does not tell."""
        losses = [float(seen.loss) for seen in self.seen]
        bad = [seen for seen, loss in zip(self.seen, losses, strict=True) if not math.isfinite(loss)]
        if not bad and all(map(math.isfinite, losses)) and losses and not self.skipped:
            bad = [self.seen[losses.index(max(losses))]]
        numbers = [int(row) for seen in bad or self.seen for row in seen.rows.tolist()]
        more = [f"and {len(numbers) - _SHOWN_ROWS} more"] if len(numbers) > _SHOWN_ROWS else []
        return self.names(numbers[:_SHOWN_ROWS]) + more

    def _watch_moves(self, step: int, learning_rate: float, model: Any) -> None:
        """After the first steps, what is trained has moved. Raises UserError where nothing has."""
        if not self.starts or learning_rate == 0.0:
            return
        self.num_moving += 1
        if self.num_moving < _STEPS_TO_MOVE:
            return
        still = [n for n, t in trainable_tensors(model).items() if _sum(t) == self.starts[n]]
        if len(still) == len(self.starts):
            got = f"{len(still)} trained tensors that have not moved by step {step}"
            rate = self.plan.train.learning_rate
            fix = f"train.learning_rate is {rate:g}: is it too small to change a weight?"
            raise UserError(Problem("train", got, "training that changes what is trained", fix))
        if still:
            shown = ", ".join(still[:2])
            text = f"{len(still)} trained tensors have not moved by step {step} (for example {shown})"
            self.emit("warning", text=text)
        self.starts = {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self.vitals)


def heard_by(callbacks: Sequence[Any]) -> Callable[[Any, torch.Tensor], None]:
    """What to tell of each micro-batch: the guard among the callbacks, or nobody."""
    return next((one.saw for one in callbacks if isinstance(one, Guard)), lambda rows, loss: None)


def _sum(tensor: torch.Tensor) -> float:
    return float(tensor.detach().sum(dtype=torch.float64))


ADVICE = "lower the learning rate, warm up for 5-10 % of the steps, clip at 1.0, or look at these rows"


class Diverged(PeftkitError):
    """Training left the road at `first_step`, and the recipe says to go back and try more gently."""

    def __init__(self, message: str, *, first_step: int) -> None:
        self.first_step = first_step
        super().__init__(message)


def divergence(plan: Plan, said: str, rows: Sequence[str]) -> Problem:
    """What the user is told of a training that left the road."""
    where = f"train.learning_rate {plan.train.learning_rate:g}"
    names = f" (rows {', '.join(rows)})" if rows else ""
    return Problem(where, f"{said}{names}", "finite numbers and a loss that falls", ADVICE)
