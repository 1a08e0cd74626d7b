"""Measure a result again: loss and metrics on held-out rows, and loss by position for long contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from peftkit.archs import Task
from peftkit.data.rows.ingest import ingest, refuse_unusable
from peftkit.data.tokens.prepare import prepare
from peftkit.errors import Problem, UserError
from peftkit.plan.plan import DataPlan
from peftkit.plan.task import FORMAT_TASKS
from peftkit.recipe.schema import Chat, Data
from peftkit.results.load import Result, open_result, positions_of
from peftkit.units import html_table

_MAX_WINDOWS = 8  # per context length: enough to see a trend, cheap enough to wait for


@dataclass(frozen=True)
class ContextLoss:
    """Mean loss in nats per token of windows of `length`, by where in the window a token stands."""

    length: int
    num_windows: int
    by_position: dict[str, float]  # "0-256" -> loss
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """What a result achieves. `loss` is in nats per learnt token; metrics are those of the task."""

    loss: float | None
    num_rows: int
    num_dropped: int  # longer than the run's max_length
    scores: dict[str, float]
    contexts: tuple[ContextLoss, ...]

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        found = []
        if self.loss is not None:
            dropped = f", {self.num_dropped:,} too long were left out" if self.num_dropped else ""
            found.append(("rows", f"{self.num_rows:,}{dropped}"))
            found.append(("loss", f"{self.loss:.4f} (perplexity {math.exp(min(self.loss, 50)):,.2f})"))
        return found + [(name, f"{value:.4f}") for name, value in self.scores.items()]

    def context_rows(self) -> list[tuple[str, ...]]:
        """Context length, windows, loss, and the loss in each range of positions."""
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


def examples_for(result: Result, data: str | None, path: Path) -> Any:
    """Held-out examples of the run, or all of a file's."""
    from peftkit.data.rows.ingest import read
    from peftkit.recipe import load

    if data is not None:
        chat = Chat(system=result.plan.data.system if result.plan else None)
        found = ingest(Data(train=data, eval=None, chat=chat), seed=0, where=lambda key: "--data")
        refuse_unusable(found, ())
        return found, found.train
    if result.run is None:
        fix = "give some: --data FILE"
        raise UserError(Problem(str(path), "an adapter without a run", "data to measure on", fix))
    found = read(load(result.run.path / "resolved.yaml"))
    return found, found.eval or found.train


def refuse_other_data(result: Result, examples: Any) -> None:
    """Raises UserError for data of another task, or with classes that the result does not know."""
    task = FORMAT_TASKS.get(examples.format)
    classifies = result.task in FORMAT_TASKS.values()
    if task != (result.task if classifies else None) or (
        result.task == "seq2seq" and examples.format == "text"
    ):
        got = f"{examples.format} data for a result of {result.task}"
        raise UserError(Problem("--data", got, f"data for {result.task}"))
    known = result.plan.base.labels if result.plan else ()
    odd = [label for label in examples.labels if label not in known]
    if odd:
        got = f"classes that were not trained: {', '.join(odd[:5])}"
        raise UserError(Problem("--data", got, f"some of {', '.join(known[:20])}"))


def tokenized(
    result: Result,
    examples: Any,
    chosen: Sequence[Any],
    *,
    whole: bool = False,
    stops: frozenset[int] = frozenset(),
) -> tuple[Any, int]:
    """(rows, how many were too long), as in training; `whole` keeps every row, to be one text.

    `stops` are the ids that end an answer, where the result has no model to tell them.
    """
    plan = result.plan
    length = plan.data.max_length if plan and not whole else 2**20
    policy = plan.data.truncation if plan and not whole and plan.data.truncation != "error" else "drop"
    data = DataPlan((), None, examples.format, {}, plan.data.mask if plan else "all", policy, length)
    labels = plan.base.labels if plan else ()
    only = replace(examples, train=tuple(chosen), eval=())
    from peftkit.model.load import eos_ids

    if result.model is not None and result.task in {"causal-lm", "seq2seq"}:
        stops = frozenset(eos_ids(result.model, result.tokenizer))
    found = prepare(only, result.tokenizer, data, task=cast(Task, result.task), labels=labels, stops=stops)
    return found.train, found.fitted.num_dropped


def loss_by_position(model: Any, stream: Sequence[int], length: int, *, first: int) -> ContextLoss:
    """Loss of windows of `length` tokens cut from a stream, by ranges of positions that double from `first`.

    Raises ValueError where the stream is shorter than one window.
    """
    import torch
    from torch.nn.functional import cross_entropy

    num = min(_MAX_WINDOWS, len(stream) // length)
    if num == 0:
        raise ValueError(f"{len(stream)} tokens are fewer than one window of {length}")
    total = torch.zeros(length - 1, dtype=torch.float64)
    model.eval()
    for i in range(num):
        ids = torch.tensor([list(stream[i * length : (i + 1) * length])], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -length:-1].float()
        total += cross_entropy(logits, ids[0, 1:], reduction="none").double().cpu()
    mean = total / num
    edges = [0, *(first * 2**i for i in range(32) if first * 2**i < length), length]
    by_position = {f"{a:,}-{b:,}": float(mean[a : b - 1].mean()) for a, b in pairwise(edges) if b - 1 > a}
    return ContextLoss(length, num, by_position, float(mean.mean()))


def _contexts(
    result: Result, rows: Sequence[Any], lengths: Sequence[int], path: Path
) -> tuple[ContextLoss, ...]:
    """Rows joined into one stream and cut into windows."""
    if result.task != "causal-lm":
        raise UserError(Problem("--context", f"a model for {result.task}", "a decoder"))
    stream = [token for row in rows for token in row.input_ids]
    longest = max(lengths)
    room = positions_of(result)
    if room is not None and longest > room:
        got = f"{longest:,} on a model whose positions are learned"
        raise UserError(Problem("--context", got, f"at most {room:,}", "it has no more positions"))
    if len(stream) < longest:
        fix = "give longer data: --data FILE"
        got = f"{longest:,}, and the data has {len(stream):,} tokens"
        raise UserError(Problem("--context", got, "no more than the data holds", fix))
    first = max(16, 2 ** int(math.log2(max(1, min(lengths) // 4))))  # the same ranges for every length
    return tuple(loss_by_position(result.model, stream, length, first=first) for length in lengths)


def evaluate(path: Path, *, data: str | None = None, contexts: Sequence[int] = ()) -> Evaluation:
    """Loss, the task's metrics, and with `contexts` the loss by position at those lengths.

    Raises UserError where there is no result, or no data to measure it on.
    """
    from peftkit.evaluate.losses import row_losses
    from peftkit.evaluate.scores import measure

    result = open_result(path)
    examples, chosen = examples_for(result, data, path)
    refuse_other_data(result, examples)
    rows, num_dropped = tokenized(result, examples, chosen, whole=bool(contexts))
    if contexts:
        return Evaluation(None, len(rows), 0, {}, _contexts(result, rows, contexts, path))
    loss = row_losses(
        result.model,
        rows,
        pad_id=result.tokenizer.pad_token_id,
        batch_size=8,
        task=result.task,
    ).mean
    scores: dict[str, float] = {}
    if result.plan is not None and result.plan.evaluate.metric is not None:
        limit = result.plan.evaluate.max_examples
        kept = {row.where: row for row in rows}
        shown = [example for example in chosen if example.where in kept][:limit]
        paired = [kept[example.where] for example in shown]
        scores = measure(result.model, result.tokenizer, result.plan, shown, paired).scores
    return Evaluation(loss, len(rows), num_dropped, scores, ())
