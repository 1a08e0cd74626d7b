"""What a run shows without being asked, and what a look at it may spend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftkit.archs import Module
from peftkit.data.tokens.mask import IGNORED, Tokenized
from peftkit.diagnose.escalation import Untrained
from peftkit.diagnose.quality import Evaluation
from peftkit.diagnose.statistics import Rows, judged
from peftkit.prepare.context import Stage

_UNTRAINED_SIZE = 0.5  # of the median row: reserved and resized rows are below, trained ones above
_LOOKED_AT = 1000  # rows whose learnt tokens are counted
_CLOSING = 4  # tokens with which a template may close a turn
_LATE = 0.1  # of the steps: the training loss of the last ones is compared
MASK_CHECKS = ("masked-rows", "end-token", "end-agreement", "template", "round-trip", "roles")


@dataclass
class Budget:
    """Tokens that looking may take, in tokens that are trained on."""

    run_tokens: float
    share: float
    spent_tokens: float = 0.0

    @property
    def left(self) -> float:
        return self.share * self.run_tokens - self.spent_tokens

    @property
    def overhead(self) -> float:
        """Of the run's tokens."""
        return self.spent_tokens / self.run_tokens


def documents_of(rows: Sequence[Tokenized]) -> tuple[int, ...]:
    """Which document each row is from: pieces of one row belong together."""
    names: dict[str, int] = {}
    return tuple(names.setdefault(row.where, len(names)) for row in rows)


def drawn(numbers: Sequence[int], limit: int) -> list[int]:
    """So many of the numbers, drawn by a fixed seed: files are often sorted."""
    if len(numbers) <= limit:
        return list(numbers)
    return sorted(np.random.default_rng(2).choice(np.asarray(numbers), size=limit, replace=False).tolist())


def untrained_tokens(model: Any, tokenizer: Any, rows: Sequence[Tokenized]) -> Untrained:
    """The tokens learnt whose row of the head is less than half as large as usual: nothing has trained it."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return Untrained()
    sizes = weight.detach().float().norm(dim=1)
    small = (sizes < _UNTRAINED_SIZE * sizes.median()).tolist()
    learnt = Counter(label for row in rows[:_LOOKED_AT] for label in row.labels if 0 <= label < len(small))
    found = [token for token in learnt if small[token]]
    names = tokenizer.convert_ids_to_tokens(found)
    return Untrained(tuple(names), sum(learnt[token] for token in found) / max(1, learnt.total()))


def masked_ends(rows: Sequence[Tokenized]) -> list[str]:
    """What is odd about where learning ends in most decoder rows; nothing where they end with it."""
    after = []
    for row in rows:
        if len(row.labels) != len(row.input_ids) or row.num_learnt == 0:
            return []
        last = max(i for i, label in enumerate(row.labels) if label != IGNORED)
        after.append(len(row.labels) - 1 - last)
    usual = sorted(after)[len(after) // 2]
    if usual <= _CLOSING:
        return []
    return [f"half of the rows go on for {usual} tokens or more after the last one that is learnt"]


def linear_modules(stage: Stage, model: Any) -> list[Module]:
    """The linear layers that hooks can watch and an adapter could have."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {name.replace(".base_layer", "") for name, _ in base.named_modules()}
    return [
        m
        for m in stage.facts.model.shape.modules
        if not (m.blocked or m.in_experts or m.by_parameter) and m.name in names
    ]


def evaluations_of(
    events: Sequence[Mapping[str, Any]], held: Sequence[Tokenized], upto: int, *, task: str
) -> tuple[list[Evaluation], float | None]:
    """(the evaluations up to a step, the training loss of the last steps before it), by a run's events.

    A step that was made twice counts as it was made last.
    """
    rates = {e["step"]: e for e in events if e["event"] == "step" and e["step"] <= upto}
    evals = {e["step"]: e for e in events if e["event"] == "eval" and e["step"] <= upto and "rows" in e}
    numbers = judged(len(held))
    counts = tuple(_learnt(held[i], task) for i in numbers)
    documents = documents_of([held[i] for i in numbers])
    found = [
        Evaluation(
            step,
            sum(event["learning_rate"] for at, event in rates.items() if at <= step),
            Rows(tuple(evals[step]["rows"]), counts, documents),
        )
        for step in sorted(evals)
    ]
    late = sorted(rates)[-max(1, int(_LATE * len(rates))) :] if rates else []
    losses = [rates[step]["loss"] for step in late]
    return found, sum(losses) / len(losses) if losses else None


def _learnt(row: Tokenized, task: str) -> int:
    """What the loss sees of a row: a decoder's first token is predicted by nothing."""
    first = task == "causal-lm" and row.labels[0] != IGNORED
    return row.num_learnt - first


def clipped_share(events: Sequence[Mapping[str, Any]], max_grad_norm: float) -> float:
    """The share of steps whose gradients were clipped."""
    norms = [float(event["grad_norm"]) for event in events if event["event"] == "step"]
    return len([norm for norm in norms if norm > max_grad_norm]) / max(1, len(norms))
