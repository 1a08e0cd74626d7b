"""Ask the model of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peftkit.archs import Task
from peftkit.errors import Problem, UserError
from peftkit.plan import Plan
from peftkit.run.result import Result, open_result


def answer(path: Path, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Greedy answers, one per prompt: user turns where the run was trained on chats, raw text elsewhere.

    Raises UserError where the run has no result yet, or the base cannot be had any more.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise UserError(Problem("prompt", "an empty prompt", "text to answer"))
    result = open_result(path)
    plan, run = result.plan, result.run
    if plan is None or run is None:
        return _written_by_foreign(result, prompts, max_new_tokens=max_new_tokens)
    model, tokenizer = result.model, result.tokenizer
    if plan.base.task not in {"causal-lm", "seq2seq"}:
        return _classes(model, tokenizer, plan, prompts)
    chats = any(event["event"] == "data" and event.get("chats") for event in run.events())
    return _written(model, tokenizer, plan, prompts, chats=chats, max_new_tokens=max_new_tokens)


def _written_by_foreign(result: Result, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """An adapter made elsewhere is asked through the chat template where its tokenizer has one."""
    from peftkit.data.formats import Example
    from peftkit.data.template import render_prompt
    from peftkit.evaluate.generation import generate_answers
    from peftkit.model.load import eos_ids

    chats = bool(result.tokenizer.chat_template)
    texts = []
    for prompt in prompts:
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""}) if chats else ()
        texts.append(render_prompt(Example("prompt", messages=turns, prompt=prompt), result.tokenizer)[0])
    stops = eos_ids(result.model, result.tokenizer)
    answers = generate_answers(
        result.model, result.tokenizer, texts, max_new_tokens=max_new_tokens, eos_token_ids=stops
    )
    return [text.strip() for text in answers]


def _written(
    model: Any, tokenizer: Any, plan: Plan, prompts: Sequence[str], *, chats: bool, max_new_tokens: int
) -> list[str]:
    """Generated answers, prompted as in training."""
    from peftkit.data.encode import source_and_target
    from peftkit.data.formats import Example
    from peftkit.data.template import render_prompt
    from peftkit.evaluate.generation import generate_answers
    from peftkit.model.load import eos_ids

    ask = source_and_target if plan.base.task == "seq2seq" else render_prompt
    texts = []
    for prompt in prompts:
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""}) if chats else ()
        texts.append(ask(Example("prompt", messages=turns, prompt=prompt), tokenizer)[0])
    answers = generate_answers(
        model,
        tokenizer,
        texts,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_ids(model, tokenizer),
        batch_size=plan.evaluate.generation_batch,
        use_cache=plan.evaluate.use_cache,
    )
    return [text.strip() for text in answers]


def _classes(model: Any, tokenizer: Any, plan: Plan, prompts: Sequence[str]) -> list[str]:
    """The likeliest class of each text, or word/tag pairs."""
    from peftkit.data.encode import ENCODERS
    from peftkit.data.formats import Example
    from peftkit.evaluate.losses import predict

    task, names = cast(Task, plan.base.task), plan.base.labels
    words = [tuple(prompt.split()) for prompt in prompts]
    examples = [
        Example("prompt", prompt=prompt, label=names[0], words=split, tags=(names[0],) * len(split))
        for prompt, split in zip(prompts, words, strict=True)
    ]
    rows = ENCODERS[task](examples, tokenizer, {name: i for i, name in enumerate(names)})
    found = predict(model, rows, pad_id=tokenizer.pad_token_id, batch_size=len(rows), task=task)
    if task == "classification":
        return [names[row[0]] for row in found]
    return [
        " ".join(f"{word}/{names[i]}" for word, i in zip(split, row, strict=False))
        for split, row in zip(words, found, strict=True)
    ]
