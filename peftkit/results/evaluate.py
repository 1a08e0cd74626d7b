"""Evaluation of a result: loss and metrics on held-out rows, and loss by position for long contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peftkit.archs import Task
from peftkit.data.rows.ingest import ingest, read_examples, refuse_unusable_rows
from peftkit.data.tokens.prepare import tokenize_examples
from peftkit.errors import Problem, UserError
from peftkit.evaluate.losses import row_losses
from peftkit.evaluate.scores import compute_metrics
from peftkit.model.load import model_stop_ids
from peftkit.objectives import FORMAT_TASKS, OBJECTIVES
from peftkit.plan.plan import DataPlan
from peftkit.recipe import load
from peftkit.recipe.schema import Chat, Data
from peftkit.results.load import Result, num_learned_positions, open_result
from peftkit.units import html_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_WINDOWS = 8  # per context length: enough to see a trend, cheap enough to wait for


@dataclass(frozen=True)
class ContextLoss:
    """The mean loss of windows of `length` tokens, in nats per token, by position in the window."""

    length: int
    num_windows: int
    by_position: dict[str, float]  # "0-256" -> loss
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a result. `loss` is in nats per token in the loss; metrics are those of the task."""

    loss: float | None
    num_rows: int
    num_dropped: int  # longer than the run's max_length
    scores: dict[str, float]
    contexts: tuple[ContextLoss, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) rows for a table."""
        table = []
        if self.loss is not None:
            dropped_note = f", {self.num_dropped:,} too long were dropped" if self.num_dropped else ""
            table.append(("rows", f"{self.num_rows:,}{dropped_note}"))
            table.append(("loss", f"{self.loss:.4f} (perplexity {math.exp(min(self.loss, 50)):,.2f})"))
        return table + [(name, f"{value:.4f}") for name, value in self.scores.items()]

    def context_rows(self) -> list[tuple[str, ...]]:
        """Return context length, windows, loss, and the loss in each range of positions, with a heading."""
        ranges = list(dict.fromkeys(r for context in self.contexts for r in context.by_position))
        head = ("context", "windows", "loss", *ranges)
        body = [
            (
                f"{c.length:,}",
                str(c.num_windows),
                f"{c.loss:.3f}",
                *(f"{c.by_position[r]:.3f}" if r in c.by_position else "" for r in ranges),
            )
            for c in self.contexts
        ]
        return [head, *body] if body else []

    def _repr_html_(self) -> str:
        return html_table([*self.rows(), *self.context_rows()])


def load_examples(result: Result, data: str | None, path: Path) -> Any:
    """Load the held-out examples of the run, or all examples of a file."""
    if data is not None:
        chat = Chat(system=result.plan.data.system if result.plan else None)
        examples = ingest(Data(train=data, eval=None, chat=chat), seed=0, where=lambda key: "--data")
        refuse_unusable_rows(examples, ())
        return examples, examples.train
    if result.run is None:
        fix = "pass --data FILE"
        raise UserError(Problem(str(path), "an adapter without a run", "data to measure on", fix))
    examples = read_examples(load(result.run.path / "resolved.yaml"))
    return examples, examples.eval or examples.train


def refuse_mismatched_data(result: Result, examples: Any) -> None:
    """Raise UserError for data of another task, or with classes that the result was not trained on."""
    task = FORMAT_TASKS.get(examples.format)
    is_classifier = not OBJECTIVES[result.task].generates_answers
    if task != (result.task if is_classifier else None) or (result.task == "seq2seq" and examples.format == "text"):
        got = f"{examples.format} data for a result of {result.task}"
        raise UserError(Problem("--data", got, f"data for {result.task}"))
    labels = result.plan.base.labels if result.plan else ()
    unknown_labels = [label for label in examples.labels if label not in labels]
    if unknown_labels:
        got = f"classes that were not trained: {', '.join(unknown_labels[:5])}"
        raise UserError(Problem("--data", got, f"some of {', '.join(labels[:20])}"))


def tokenize_for_result(
    result: Result, examples: Any, selection: Sequence[Any], *, whole: bool = False, stops: frozenset[int] = frozenset()
) -> tuple[Any, int]:
    """Tokenize examples as in training; return the rows and the number dropped as too long.

    `whole` keeps every row, to be joined into one text. `stops` are the token ids that end an answer, where
    the result has no model to provide them.
    """
    plan = result.plan
    length = plan.data.max_length if plan and not whole else 2**20
    policy = plan.data.truncation if plan and not whole and plan.data.truncation != "error" else "drop"
    data = DataPlan((), None, examples.format, {}, plan.data.mask if plan else "all", policy, length)
    labels = plan.base.labels if plan else ()
    selected_examples = replace(examples, train=tuple(selection), eval=())

    if result.model is not None and OBJECTIVES[result.task].generates_answers:
        stops = frozenset(model_stop_ids(result.model, result.tokenizer))
    prepared = tokenize_examples(
        selected_examples, result.tokenizer, data, task=cast(Task, result.task), labels=labels, stops=stops
    )
    return prepared.train, prepared.truncation.num_dropped


def loss_by_position(model: PreTrainedModel, stream: Sequence[int], length: int, *, first: int) -> ContextLoss:
    """Compute the loss of windows of `length` tokens cut from a stream, by position in the window.

    Ranges of positions double from `first`: 0 to first, first to 2 * first, and so on to `length`. Raises
    ValueError where the stream is shorter than one window.
    """
    import torch
    from torch.nn.functional import cross_entropy

    num_windows = min(_MAX_WINDOWS, len(stream) // length)
    if num_windows == 0:
        raise ValueError(f"{len(stream)} tokens are fewer than one window of {length}")
    total = torch.zeros(length - 1, dtype=torch.float64)
    model.eval()
    for i in range(num_windows):
        ids = torch.tensor([list(stream[i * length : (i + 1) * length])], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -length:-1].float()
        total += cross_entropy(logits, ids[0, 1:], reduction="none").double().cpu()
    mean = total / num_windows
    edges = [0, *(first * 2**i for i in range(32) if first * 2**i < length), length]
    by_position = {f"{a:,}-{b:,}": float(mean[a : b - 1].mean()) for a, b in pairwise(edges) if b - 1 > a}
    return ContextLoss(length, num_windows, by_position, float(mean.mean()))


def _contexts(result: Result, rows: Sequence[Any], lengths: Sequence[int]) -> tuple[ContextLoss, ...]:
    """Rows joined into one stream and cut into windows."""
    if result.task != "causal-lm":
        raise UserError(Problem("--context", f"a model for {result.task}", "a decoder"))
    stream = [token for row in rows for token in row.input_ids]
    longest = max(lengths)
    max_positions = num_learned_positions(result)
    if max_positions is not None and longest > max_positions:
        got = f"{longest:,} on a model whose positions are learned"
        raise UserError(Problem("--context", got, f"at most {max_positions:,}", "it has no more positions"))
    if len(stream) < longest:
        fix = "pass longer data: --data FILE"
        got = f"{longest:,}, and the data has {len(stream):,} tokens"
        raise UserError(Problem("--context", got, "no more than the data holds", fix))
    first = max(16, 2 ** int(math.log2(max(1, min(lengths) // 4))))  # the same ranges for every length
    return tuple(loss_by_position(result.model, stream, length, first=first) for length in lengths)


def evaluate(path: Path, *, data: str | None = None, contexts: Sequence[int] = ()) -> Evaluation:
    """Evaluate a result: loss, the task's metrics, and with `contexts` the loss by position at those lengths.

    Raises UserError where there is no result, or no data to measure it on.
    """
    result = open_result(path)
    examples, selection = load_examples(result, data, path)
    refuse_mismatched_data(result, examples)
    rows, num_dropped = tokenize_for_result(result, examples, selection, whole=bool(contexts))
    if contexts:
        return Evaluation(None, len(rows), 0, {}, _contexts(result, rows, contexts))
    loss = row_losses(result.model, rows, pad_id=result.tokenizer.pad_token_id, batch_size=8, task=result.task).mean
    scores: dict[str, float] = {}
    if result.plan is not None and result.plan.evaluate.metric is not None:
        limit = result.plan.evaluate.max_examples
        rows_by_location = {row.where: row for row in rows}
        scored_examples = [example for example in selection if example.where in rows_by_location][:limit]
        scored_rows = [rows_by_location[example.where] for example in scored_examples]
        scores = compute_metrics(result.model, result.tokenizer, result.plan, scored_examples, scored_rows).scores
    return Evaluation(loss, len(rows), num_dropped, scores, ())
