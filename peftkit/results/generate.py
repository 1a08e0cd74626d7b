"""Generate answers with the model of a finished run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from peftkit.archs import Task
from peftkit.data.chat.template import render_prompt
from peftkit.data.formats import Example
from peftkit.data.formats.classes import show_classes
from peftkit.data.tokens.encode import ENCODERS, seq2seq_texts
from peftkit.errors import Problem, UserError
from peftkit.evaluate.generation import Sampling, encode_prompts, generate_answers
from peftkit.evaluate.losses import predict_classes
from peftkit.model.load import model_stop_ids
from peftkit.objectives import OBJECTIVES
from peftkit.plan import Plan
from peftkit.recipe.document import INVALID_CHARS
from peftkit.report.progress import quiet_libraries
from peftkit.results.load import Result, num_learned_positions, open_result
from peftkit.rundir.events import DataEvent, of_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversation:
    """A conversation with the model of a finished run. Turns are kept where it was trained on chats.

    Raises UserError where the run has no result yet, or the base is not available any more.
    """

    def __init__(self, path: Path, sampling: Sampling) -> None:
        self.result = open_result(path)
        self.sampling = sampling
        self.keeps_turns = _is_asked_in_turns(self.result)
        self.turns: list[dict[str, str]] = []

    def ask(self, prompt: str, show: Callable[[str], object] | None = None) -> str:
        """Return the answer to the next prompt. `show` is given each piece of it as soon as it is there."""
        refuse_unreadable([prompt])
        turns = [*(self.turns if self.keeps_turns else ()), {"role": "user", "content": prompt}]
        with quiet_libraries():
            [answer] = _answers(self.result, [turns], self.sampling, show)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        self.sampling = replace(self.sampling, seed=self.sampling.next_seed(1))
        return answer


def answer(path: Path, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Return answers, one per prompt: user turns if the run was trained on chats, else raw text.

    Raises UserError where the run has no result yet, or the base is not available any more.
    """
    refuse_unreadable(prompts)
    result = open_result(path)
    return _answers(result, [[{"role": "user", "content": prompt}] for prompt in prompts], sampling, None)


def refuse_unreadable(prompts: Sequence[str]) -> None:
    """Raise UserError for an empty prompt, or one that is no text."""
    if not all(prompt.strip() for prompt in prompts):
        raise UserError(Problem("prompt", "an empty prompt", "text to answer"))
    if any(found := [match for prompt in prompts if (match := INVALID_CHARS.search(prompt))]):
        got = f"the character U+{ord(found[0][0]):04X}"
        raise UserError(Problem("prompt", got, "text in UTF-8", "convert it: iconv -f ... -t UTF-8"))


def _is_asked_in_turns(result: Result) -> bool:
    """Return whether the run was trained on chats; made elsewhere, whether its tokenizer has a chat template."""
    if result.run is None:
        return bool(result.tokenizer.chat_template)
    return any(event.chats for event in of_type(result.run.events(), DataEvent))


def _answers(
    result: Result,
    conversations: Sequence[Sequence[dict[str, str]]],
    sampling: Sampling,
    show: Callable[[str], object] | None,
) -> list[str]:
    """Return the next turn of each conversation, rendered as in training."""
    plan, model, tokenizer = result.plan, result.model, result.tokenizer
    prompts = [turns[-1]["content"] for turns in conversations]
    if plan is not None and not OBJECTIVES[plan.base.task].generates_answers:
        if sampling.temperature:
            got = f"temperature {sampling.temperature:g} with {plan.base.task}"
            raise UserError(Problem("temperature", got, "0: classes are not drawn", "leave it out"))
        found = _predict(result, plan, prompts)
        for text in found if show else ():
            cast(Callable[[str], object], show)(text)
        return found
    render = seq2seq_texts if result.task == "seq2seq" else render_prompt
    system = [{"role": "system", "content": plan.data.system}] if plan is not None and plan.data.system else []
    is_asked_in_turns = _is_asked_in_turns(result)
    texts = []
    for turns in conversations:
        whole = (*system, *turns, {"role": "assistant", "content": ""}) if is_asked_in_turns else ()
        texts.append(render(Example("prompt", messages=whole, prompt=turns[-1]["content"]), tokenizer)[0])
    mask = encode_prompts(texts, tokenizer, is_encoder_decoder=result.task == "seq2seq")["attention_mask"]
    num_new_tokens = sampling.max_new_tokens if result.task == "causal-lm" else 0
    _refuse_beyond_positions(result, int(mask.sum(1).max()), num_new_tokens)
    answers = generate_answers(
        model,
        tokenizer,
        texts,
        sampling=sampling,
        eos_token_ids=model_stop_ids(model, tokenizer),
        batch_size=result.generation_batch,
        use_cache=result.use_cache,
        show=show,
    )
    return [text.strip() for text in answers]


def _predict(result: Result, plan: Plan, prompts: Sequence[str]) -> list[str]:
    """Return the most likely class of each text, or its words with their tags."""
    model, tokenizer = result.model, result.tokenizer
    task, names = cast(Task, plan.base.task), plan.base.labels
    words = [tuple(prompt.split()) for prompt in prompts]
    examples = [
        Example("prompt", prompt=prompt, label=names[0], words=prompt_words, tags=(names[0],) * len(prompt_words))
        for prompt, prompt_words in zip(prompts, words, strict=True)
    ]
    rows = ENCODERS[task](examples, tokenizer, {name: i for i, name in enumerate(names)})
    _refuse_beyond_positions(result, max(len(row.input_ids) for row in rows), 0)
    predictions = predict_classes(model, rows, pad_id=tokenizer.pad_token_id, batch_size=len(rows), task=task)
    if task == "classification":
        return [names[row[0]] for row in predictions]
    if task == "multi-label":
        return [show_classes(names[i] for i in row) for row in predictions]
    return [
        tagged_text(tokenizer, prompt_words, [names[i] for i in row])
        for prompt_words, row in zip(words, predictions, strict=True)
    ]


def _refuse_beyond_positions(result: Result, num_prompt_tokens: int, num_new_tokens: int) -> None:
    """Raise UserError where a prompt and its answer exceed the learned positions of the model."""
    max_positions = num_learned_positions(result)
    if max_positions is not None and num_prompt_tokens + num_new_tokens > max_positions:
        got = f"{num_prompt_tokens} tokens and up to {num_new_tokens} new ones"
        raise UserError(Problem("prompt", got, f"at most {max_positions}, the learned positions of the model"))


def tagged_text(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], tags: Sequence[str]) -> str:
    """'word/tag' pairs. A word of which the tokenizer keeps nothing has no tag, and is shown with '?'."""
    tagged_indices = {i for i in tokenizer(list(words), is_split_into_words=True).word_ids(0) if i is not None}
    remaining_tags = iter(tags)
    return " ".join(f"{word}/{next(remaining_tags) if i in tagged_indices else '?'}" for i, word in enumerate(words))
