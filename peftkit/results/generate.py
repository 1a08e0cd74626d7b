"""Generate answers with the model of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from peftkit.archs import Task
from peftkit.data.chat.template import render_prompt
from peftkit.data.formats import Example
from peftkit.data.tokens.encode import ENCODERS, seq2seq_texts
from peftkit.errors import Problem, UserError
from peftkit.evaluate.generation import generate_answers
from peftkit.evaluate.losses import predict_classes
from peftkit.model.load import model_stop_ids
from peftkit.objectives import OBJECTIVES
from peftkit.results.load import Result, num_learned_positions, open_result
from peftkit.rundir.events import DataEvent, of_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer(path: Path, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Return greedy answers, one per prompt: user turns if the run was trained on chats, else raw text.

    Raises UserError where the run has no result yet, or the base is not available any more.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise UserError(Problem("prompt", "an empty prompt", "text to answer"))
    result = open_result(path)
    refuse_beyond_positions(result, prompts, max_new_tokens)
    plan, run = result.plan, result.run
    if plan is None or run is None:
        # an adapter made elsewhere is asked through the chat template where its tokenizer has one

        chats = bool(result.tokenizer.chat_template)
        texts = []
        for prompt in prompts:
            turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""}) if chats else ()
            texts.append(render_prompt(Example("prompt", messages=turns, prompt=prompt), result.tokenizer)[0])
        stops = model_stop_ids(result.model, result.tokenizer)
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
    model, tokenizer = result.model, result.tokenizer
    if not OBJECTIVES[plan.base.task].generates_answers:
        # the most likely class of each text, or its words with their tags
        task, names = cast(Task, plan.base.task), plan.base.labels
        words = [tuple(prompt.split()) for prompt in prompts]
        examples = [
            Example("prompt", prompt=prompt, label=names[0], words=prompt_words, tags=(names[0],) * len(prompt_words))
            for prompt, prompt_words in zip(prompts, words, strict=True)
        ]
        rows = ENCODERS[task](examples, tokenizer, {name: i for i, name in enumerate(names)})
        predictions = predict_classes(model, rows, pad_id=tokenizer.pad_token_id, batch_size=len(rows), task=task)
        if task == "classification":
            return [names[row[0]] for row in predictions]
        return [
            tagged_text(tokenizer, prompt_words, [names[i] for i in row])
            for prompt_words, row in zip(words, predictions, strict=True)
        ]
    chats = any(event.chats for event in of_type(run.events(), DataEvent))
    # generate answers to prompts that are rendered as in training

    render = seq2seq_texts if plan.base.task == "seq2seq" else render_prompt
    system = ({"role": "system", "content": plan.data.system},) if plan.data.system else ()
    texts = []
    for prompt in prompts:
        turns = (*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": ""})
        example = Example("prompt", messages=turns if chats else (), prompt=prompt)
        texts.append(render(example, tokenizer)[0])
    answers = generate_answers(
        model,
        tokenizer,
        texts,
        max_new_tokens=max_new_tokens,
        eos_token_ids=model_stop_ids(model, tokenizer),
        batch_size=plan.evaluate.generation_batch,
        use_cache=plan.evaluate.use_cache,
    )
    return [text.strip() for text in answers]


def refuse_beyond_positions(result: Result, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Raise UserError where a prompt and its answer exceed the learned positions of the model."""
    max_positions = num_learned_positions(result)
    if max_positions is None:
        return
    num_new_tokens = max_new_tokens if result.task == "causal-lm" else 0
    num_prompt_tokens = max(len(result.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    if num_prompt_tokens + num_new_tokens > max_positions:
        got = f"{num_prompt_tokens} tokens and up to {num_new_tokens} new ones"
        raise UserError(Problem("prompt", got, f"at most {max_positions}, the learned positions of the model"))


def tagged_text(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], tags: Sequence[str]) -> str:
    """'word/tag' pairs. A word of which the tokenizer keeps nothing has no tag, and is shown with '?'."""
    tagged_indices = {i for i in tokenizer(list(words), is_split_into_words=True).word_ids(0) if i is not None}
    remaining_tags = iter(tags)
    return " ".join(f"{word}/{next(remaining_tags) if i in tagged_indices else '?'}" for i, word in enumerate(words))
