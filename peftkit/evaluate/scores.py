"""Metrics of a task on held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftkit.data.chat.template import render_prompt
from peftkit.data.formats import Example
from peftkit.data.formats.classes import show_classes
from peftkit.data.tokens.encode import seq2seq_texts
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.evaluate import metrics
from peftkit.evaluate.losses import predict_classes
from peftkit.model.load import model_stop_ids
from peftkit.objectives import OBJECTIVES
from peftkit.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NUM_SAMPLES = 5


@dataclass(frozen=True)
class TaskMetrics:
    """Scores by metric, and the first few answers beside their references."""

    scores: dict[str, float]
    num_examples: int
    samples: list[dict[str, str]]


def _sample_answers(
    examples: Sequence[Example], answers: Sequence[object], references: Sequence[object]
) -> list[dict[str, str]]:
    return [
        {"where": e.where, "answer": str(a), "reference": str(r)}
        for e, a, r in list(zip(examples, answers, references, strict=True))[:_NUM_SAMPLES]
    ]


def compute_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    examples: Sequence[Example],
    rows: Sequence[Tokenized],
) -> TaskMetrics:
    """Compute every metric of the plan's task. `rows` are the examples, tokenized."""
    if OBJECTIVES[plan.base.task].generates_answers:
        # greedy answers against references
        from peftkit.evaluate.generation import Sampling, generate_answers

        render = seq2seq_texts if plan.base.task == "seq2seq" else render_prompt
        pairs = [render(example, tokenizer) for example in examples]
        answers = generate_answers(
            model,
            tokenizer,
            [prompt for prompt, _ in pairs],
            sampling=Sampling(plan.evaluate.max_new_tokens),
            eos_token_ids=model_stop_ids(model, tokenizer),
            batch_size=plan.evaluate.generation_batch,
            use_cache=plan.evaluate.use_cache,
        )
        references = [reference for _, reference in pairs]
        scores = {
            "exact_match": metrics.exact_match(answers, references),
            "token_f1": metrics.token_f1(answers, references),
        }
        return TaskMetrics(scores, len(pairs), _sample_answers(examples, answers, references))
    # likeliest classes against references

    predictions = predict_classes(
        model,
        rows,
        pad_id=tokenizer.pad_token_id,
        batch_size=max(32, plan.train.micro_batch),
        task=plan.base.task,
        autocast=plan.train.autocast,
    )
    names = plan.base.labels
    predicted = [[names[i] for i in row] for row in predictions]
    if plan.base.task == "multi-label":
        chosen = [[name for name, flag in zip(names, row.labels, strict=True) if flag == 1] for row in rows]
        micro_f1, macro_f1 = metrics.multi_label_f1(predicted, chosen)
        shown, wanted = ([*map(show_classes, classes)] for classes in (predicted, chosen))
        scores = {"micro_f1": micro_f1, "macro_f1": macro_f1, "exact_match": metrics.exact_match(shown, wanted)}
        return TaskMetrics(scores, len(rows), _sample_answers(examples, shown, wanted))
    expected = [[names[i] for i in row.labels if i != IGNORE_INDEX] for row in rows]
    flat_answers = [name for row in predicted for name in row]
    flat_references = [name for row in expected for name in row]
    scores = {
        "accuracy": metrics.accuracy(flat_answers, flat_references),
        "macro_f1": metrics.macro_f1(flat_answers, flat_references),
    }
    if plan.base.task == "token-classification":
        scores["entity_f1"] = metrics.entity_f1(predicted, expected)
    samples = _sample_answers(examples, [" ".join(p) for p in predicted], [" ".join(e) for e in expected])
    return TaskMetrics(scores, len(rows), samples)
