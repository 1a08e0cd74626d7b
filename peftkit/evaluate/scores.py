"""The metrics of a task on held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.data.formats import Example
from peftkit.data.tokens.mask import IGNORED, Tokenized
from peftkit.evaluate import metrics
from peftkit.plan import Plan

_SAMPLES = 5


@dataclass(frozen=True)
class Measured:
    """Scores by metric, and the first few answers beside their references."""

    scores: dict[str, float]
    num_examples: int
    samples: list[dict[str, str]]


def _samples(
    examples: Sequence[Example], answers: Sequence[Any], references: Sequence[Any]
) -> list[dict[str, str]]:
    return [
        {"where": e.where, "answer": str(a), "reference": str(r)}
        for e, a, r in list(zip(examples, answers, references, strict=True))[:_SAMPLES]
    ]


def _written(model: Any, tokenizer: Any, plan: Plan, examples: Sequence[Example]) -> Measured:
    """Greedy answers against references."""
    from peftkit.data.chat.template import render_prompt
    from peftkit.data.tokens.encode import source_and_target
    from peftkit.evaluate.generation import generate_answers
    from peftkit.model.load import eos_ids

    ask = source_and_target if plan.base.task == "seq2seq" else render_prompt
    pairs = [ask(example, tokenizer) for example in examples]
    answers = generate_answers(
        model,
        tokenizer,
        [prompt for prompt, _ in pairs],
        max_new_tokens=plan.evaluate.max_new_tokens,
        eos_token_ids=eos_ids(model, tokenizer),
        batch_size=plan.evaluate.generation_batch,
        use_cache=plan.evaluate.use_cache,
    )
    references = [reference for _, reference in pairs]
    scores = {
        "exact_match": metrics.exact_match(answers, references),
        "token_f1": metrics.token_f1(answers, references),
    }
    return Measured(scores, len(pairs), _samples(examples, answers, references))


def _classified(
    model: Any, tokenizer: Any, plan: Plan, examples: Sequence[Example], rows: Sequence[Tokenized]
) -> Measured:
    """Likeliest classes against references."""
    from peftkit.evaluate.losses import predict

    found = predict(
        model,
        rows,
        pad_id=tokenizer.pad_token_id,
        batch_size=max(32, plan.train.micro_batch),
        task=plan.base.task,
        autocast=plan.train.autocast,
    )
    names = plan.base.labels
    answers = [[names[i] for i in row] for row in found]
    references = [[names[i] for i in row.labels if i != IGNORED] for row in rows]
    flat = [name for row in answers for name in row]
    wanted = [name for row in references for name in row]
    scores = {"accuracy": metrics.accuracy(flat, wanted), "macro_f1": metrics.macro_f1(flat, wanted)}
    if plan.base.task == "token-classification":
        scores["entity_f1"] = metrics.entity_f1(answers, references)
    shown = _samples(examples, [" ".join(a) for a in answers], [" ".join(r) for r in references])
    return Measured(scores, len(rows), shown)


def measure(
    model: Any, tokenizer: Any, plan: Plan, examples: Sequence[Example], rows: Sequence[Tokenized]
) -> Measured:
    """Every metric of the plan's task. `rows` are the examples, tokenized."""
    if plan.base.task in {"causal-lm", "seq2seq"}:
        return _written(model, tokenizer, plan, examples)
    return _classified(model, tokenizer, plan, examples, rows)
