"""Ask the model of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peftkit.archs import Task
from peftkit.errors import Problem, UserError
from peftkit.plan import Plan
from peftkit.results.load import Result, open_result, positions_of


def answer(path: Path, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Greedy answers, one per prompt: user turns where the run was trained on chats, raw text elsewhere.

    Raises UserError where the run has no result yet, or the base cannot be had any more.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise UserError(Problem("prompt", "an empty prompt", "text to answer"))
    result = open_result(path)
    refuse_beyond_positions(result, prompts, max_new_tokens)
    plan, run = result.plan, result.run
    if plan is None or run is None:
        return _written_by_foreign(result, prompts, max_new_tokens=max_new_tokens)
    model, tokenizer = result.model, result.tokenizer
    if plan.base.task not in {"causal-lm", "seq2seq"}:
        return _classes(model, tokenizer, plan, prompts)
    chats = any(event["event"] == "data" and event.get("chats") for event in run.events())
    return _written(model, tokenizer, plan, prompts, chats=chats, max_new_tokens=max_new_tokens)


def refuse_beyond_positions(result: Result, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Raises UserError where a model would run out of learned positions."""
    room = positions_of(result)
    if room is None:
        return
    new = max_new_tokens if result.task == "causal-lm" else 0
    longest = max(len(result.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    if longest + new > room:
        got = f"{longest} tokens and up to {new} new ones"
        raise UserError(Problem("prompt", got, f"at most {room}, the positions that the model learnt"))


def _written_by_foreign(result: Result, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """An adapter made elsewhere is asked through the chat template where its tokenizer has one."""
    from peftkit.data.chat.template import render_prompt
    from peftkit.data.formats import Example
    from peftkit.evaluate.generation import generate_answers
    from peftkit.model.load import eos_ids

    chats = bool(result.tokenizer.chat_template)
    texts = []
    for prompt in prompts:
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""}) if chats else ()
        texts.append(render_prompt(Example("prompt", messages=turns, prompt=prompt), result.tokenizer)[0])
    stops = eos_ids(result.model, result.tokenizer)
    answers = generate_answers(
        result.model,
        result.tokenizer,
        texts,
        max_new_tokens=max_new_tokens,
        eos_token_ids=stops,
        batch_size=result.generation_batch,
        use_cache=result.use_cache,
    )
    return [text.strip() for text in answers]


def _written(
    model: Any, tokenizer: Any, plan: Plan, prompts: Sequence[str], *, chats: bool, max_new_tokens: int
) -> list[str]:
    """Generated answers, prompted as in training."""
    from peftkit.data.chat.template import render_prompt
    from peftkit.data.formats import Example
    from peftkit.data.tokens.encode import source_and_target
    from peftkit.evaluate.generation import generate_answers
    from peftkit.model.load import eos_ids

    ask = source_and_target if plan.base.task == "seq2seq" else render_prompt
    system = ({"role": "system", "content": plan.data.system},) if plan.data.system else ()
    texts = []
    for prompt in prompts:
        asked = (*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": ""})
        example = Example("prompt", messages=asked if chats else (), prompt=prompt)
        texts.append(ask(example, tokenizer)[0])
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
    """The likeliest class of each text, or its words with their tags."""
    from peftkit.data.formats import Example
    from peftkit.data.tokens.encode import ENCODERS
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
        _tagged(tokenizer, split, [names[i] for i in row]) for split, row in zip(words, found, strict=True)
    ]


def _tagged(tokenizer: Any, words: Sequence[str], tags: Sequence[str]) -> str:
    """'word/tag' pairs. A word of which the tokenizer keeps nothing has no tag, and is shown with '?'."""
    kept = {i for i in tokenizer(list(words), is_split_into_words=True).word_ids(0) if i is not None}
    left = iter(tags)
    return " ".join(f"{word}/{next(left) if i in kept else '?'}" for i, word in enumerate(words))
