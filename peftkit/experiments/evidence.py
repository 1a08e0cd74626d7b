"""Evidence that a run leaves without extra measurements, and the token budget of a look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftkit.archs import Module
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.diagnose.causes import Measurement
from peftkit.diagnose.escalation import UntrainedTokens
from peftkit.diagnose.quality import EvaluationPoint
from peftkit.diagnose.statistics import HeldOutLosses, recorded_rows
from peftkit.model.quantize import weight_norm
from peftkit.plan import Plan
from peftkit.prepare.context import RunContext
from peftkit.rundir.events import UNSET, EvalEvent, Event, GrowthEvent, GrowthTakenBackEvent, StepEvent, of_type
from peftkit.train.checkpoint.snapshot import Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UNTRAINED_NORM_SHARE = 0.5  # of the median row: reserved and resized rows are below, trained ones above
_MAX_COUNTED_ROWS = 1000  # rows whose learnt tokens are counted
_MAX_CLOSING_TOKENS = 4  # tokens with which a template may close a turn
_LATE_SHARE = 0.1  # of the steps: the training loss of the last ones is compared
MASK_CHECKS = ("masked-rows", "end-token", "end-agreement", "template", "round-trip", "roles")


@dataclass
class TokenBudget:
    """The token budget of a look, in tokens that are trained on."""

    run_tokens: float
    share: float
    spent_tokens: float = 0.0

    @property
    def left(self) -> float:
        """Return the tokens that may still be spent."""
        return self.share * self.run_tokens - self.spent_tokens

    @property
    def overhead(self) -> float:
        """Return the spent tokens as a share of the run's tokens."""
        return self.spent_tokens / self.run_tokens


@dataclass(frozen=True)
class JudgedState:
    """A state of a training, and the held-out rows that decide, with the document of each, for what is measured of it.

    `is_prepared` says whether a trainer has prepared the model. `announce` tells the user of a measurement.
    """

    context: RunContext
    model: Any
    trained: Tensors
    rows: Sequence[Tokenized]
    documents: tuple[int, ...]
    budget: TokenBudget
    is_prepared: bool
    announce: Callable[[Measurement], None]

    @property
    def pad_id(self) -> int:
        return int(self.context.tokenizer.pad_token_id)


def document_ids(rows: Sequence[Tokenized]) -> tuple[int, ...]:
    """Return a document number for each row; pieces of one row share it."""
    names: dict[str, int] = {}
    return tuple(names.setdefault(row.where, len(names)) for row in rows)


def sample_numbers(numbers: Sequence[int], limit: int) -> list[int]:
    """Sample at most `limit` of the numbers with a fixed seed, since files are often sorted."""
    if len(numbers) <= limit:
        return list(numbers)
    return sorted(np.random.default_rng(2).choice(np.asarray(numbers), size=limit, replace=False).tolist())


def find_untrained_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Tokenized]
) -> UntrainedTokens:
    """Find tokens in the loss whose row of the head is untrained.

    A row counts as untrained where its norm is below half the median norm. Returns their names, and their
    share of the tokens in the loss.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return UntrainedTokens()
    norms = weight.detach().float().norm(dim=1)
    is_small = (norms < _UNTRAINED_NORM_SHARE * norms.median()).tolist()
    token_counts = Counter(
        label for row in rows[:_MAX_COUNTED_ROWS] for label in row.labels if 0 <= label < len(is_small)
    )
    untrained = [token for token in token_counts if is_small[token]]
    names = tokenizer.convert_ids_to_tokens(untrained)
    return UntrainedTokens(tuple(names), sum(token_counts[token] for token in untrained) / max(1, token_counts.total()))


def describe_masked_ends(rows: Sequence[Tokenized]) -> list[str]:
    """Describe decoder rows whose loss stops well before the row ends; empty where most do not."""
    tail_lengths = []
    for row in rows:
        if len(row.labels) != len(row.input_ids) or row.num_learnt == 0:
            return []
        last_trained = max(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX)
        tail_lengths.append(len(row.labels) - 1 - last_trained)
    median_tail = sorted(tail_lengths)[len(tail_lengths) // 2]
    if median_tail <= _MAX_CLOSING_TOKENS:
        return []
    return [f"half of the rows continue for {median_tail} tokens or more after their last token in the loss"]


def update_pace(plan: Plan, model: PreTrainedModel, trained: Tensors, step: int) -> float | None:
    """Return the mean of |s B A| / |W| over layers with a LoRA, over the share of the run's steps that made it.

    |B A|^2 = trace((B^T B) (A A^T)), which needs matrices of the rank's size only. None without such layers, or
    where another run made a part of it.
    """
    if plan.method.start_from is not None:
        return None
    shares = []
    for name, module in model.named_modules():
        a, b = (trained.get(f"{name}.lora_{side}.default.weight") for side in "AB")
        if a is None or b is None:
            continue
        weight = getattr(module.get_base_layer(), "weight", None)
        if weight is not None and a.ndim == b.ndim == 2:  # neither fused experts nor a convolution
            a, b = a.float(), b.float()
            size = float(torch.sum((b.T @ b) * (a @ a.T))) ** 0.5
            shares.append(module.scaling["default"] * size / weight_norm(weight))
    num_steps = step - max((growth.step for growth in plan.growths if growth.is_new_start), default=0)
    return sum(shares) / len(shares) * (plan.train.num_steps or 1) / num_steps if shares and num_steps else None


def linear_modules(context: RunContext, model: PreTrainedModel) -> list[Module]:
    """Return the linear layers that hooks can watch and an adapter could target."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {name.replace(".base_layer", "") for name, _ in base.named_modules()}
    return [
        module
        for module in context.facts.model.shape.modules
        if not (module.blocked_reason or module.in_experts or module.by_parameter) and module.name in names
    ]


def read_evaluations(
    events: Sequence[Event], held_out: Sequence[Tokenized], last_step: int, *, task: str
) -> tuple[list[EvaluationPoint], float | None]:
    """Read a run's events: return its evaluations up to a step, and the mean training loss of the last steps.

    A step that was repeated counts as it was last. The loss is None where there are no steps.
    """
    step_events = {e.step: e for e in of_type(events, StepEvent) if e.step <= last_step}
    eval_events = {e.step: e for e in of_type(events, EvalEvent) if e.step <= last_step and e.rows is not UNSET}
    numbers = recorded_rows(len(held_out))
    # nothing predicts a decoder's first token
    is_decoder = task == "causal-lm"
    rows = [held_out[i] for i in numbers]
    counts = tuple(row.num_learnt - (is_decoder and row.labels[0] != IGNORE_INDEX) for row in rows)
    documents = document_ids(rows)
    evaluations = [
        EvaluationPoint(
            step,
            sum(event.learning_rate for event_step, event in step_events.items() if event_step <= step),
            HeldOutLosses(tuple(eval_events[step].rows), counts, documents),
        )
        for step in sorted(eval_events)
    ]
    late_steps = sorted(step_events)[-max(1, int(_LATE_SHARE * len(step_events))) :] if step_events else []
    losses = [step_events[step].loss for step in late_steps]
    return evaluations, sum(losses) / len(losses) if losses else None


def standing_events(events: Sequence[Event], plan: Plan) -> list[Event]:
    """Return the events of the states that the run stands on.

    What came between a change and its being taken back is left out, and the steps before a new adapter.
    """
    standing: list[Event] = []
    changes: list[int] = []
    for event in events:
        if isinstance(event, GrowthTakenBackEvent):
            del standing[changes.pop() if changes else len(standing) :]
        elif isinstance(event, GrowthEvent):
            changes.append(len(standing))
        standing.append(event)
    start = max((growth.step for growth in plan.growths if growth.is_new_start), default=0)
    return [event for event in standing if event.get("step", start) >= start]


def clipped_share(events: Sequence[Event], max_grad_norm: float) -> float:
    """Return the share of steps whose gradients were clipped."""
    norms = [event.grad_norm for event in of_type(events, StepEvent)]
    return len([norm for norm in norms if norm > max_grad_norm]) / max(1, len(norms))
