"""Tokens and labels of tasks other than language modelling: targets, classes, tags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftkit.archs import Task
from peftkit.data.chat.template import render_prompt
from peftkit.data.formats import Example
from peftkit.data.tokens.mask import IGNORED, Tokenized

Encoder = Callable[[Sequence[Example], Any, Mapping[str, int]], list[Tokenized]]


def source_and_target(example: Example, tokenizer: Any) -> tuple[str, str]:
    """What an encoder-decoder reads and what it is to write.

    A chat is read through the tokenizer's template where it has one; a single question goes in as it is.
    """
    if example.messages and tokenizer.chat_template:
        return render_prompt(example, tokenizer)
    if example.messages:
        return example.messages[0]["content"], example.messages[-1]["content"]
    return example.prompt, example.completion


def _seq2seq(examples: Sequence[Example], tokenizer: Any, ids: Mapping[str, int]) -> list[Tokenized]:
    """Source ids as the tokenizer ends them, and target ids as labels, which end in its end token."""
    pairs = [source_and_target(example, tokenizer) for example in examples]
    sources = tokenizer([source for source, _ in pairs])["input_ids"]
    targets = tokenizer(text_target=[target for _, target in pairs])["input_ids"]
    end = tokenizer.eos_token_id
    return [
        _weighted(Tokenized(list(s), list(t) if t and t[-1] == end else [*t, end], e.where), _last_weight(e))
        for s, t, e in zip(sources, targets, examples, strict=True)
    ]


def _last_weight(example: Example) -> float:
    """The weight of what is written: the row's, times that of its last turn."""
    turn = example.messages[-1] if example.messages else {}
    return example.weight * float(turn.get("weight", 1.0))


def _weighted(row: Tokenized, weight: float) -> Tokenized:
    """The row with its weight at every label, where it has one of its own; of weight 0 nothing is learnt."""
    if weight == 0.0:
        return replace(row, labels=[IGNORED] * len(row.labels))
    return row if weight == 1.0 else replace(row, weights=[weight] * len(row.labels))


def _classes(examples: Sequence[Example], tokenizer: Any, ids: Mapping[str, int]) -> list[Tokenized]:
    """The text's ids; the label is the class alone."""
    texts = tokenizer([example.prompt for example in examples])["input_ids"]
    return [
        _weighted(Tokenized(list(text), [ids[example.label]], example.where), example.weight)
        for text, example in zip(texts, examples, strict=True)
    ]


def needs_template(examples: Sequence[Example]) -> bool:
    """Whether some chat has more than a question and its answer, so that turns have to be told apart."""
    return any(len(example.messages) > 2 for example in examples)


def _tags(examples: Sequence[Example], tokenizer: Any, ids: Mapping[str, int]) -> list[Tokenized]:
    """The words' ids; a word's tag is learnt at its first token, its other tokens count nothing."""
    encoded = tokenizer([list(example.words) for example in examples], is_split_into_words=True)
    found = []
    for number, example in enumerate(examples):
        labels, last = [], None
        for word in encoded.word_ids(number):
            labels.append(ids[example.tags[word]] if word is not None and word != last else IGNORED)
            last = word
        row = Tokenized(list(encoded["input_ids"][number]), labels, example.where)
        found.append(_weighted(row, example.weight))
    return found


ENCODERS: Mapping[Task, Encoder] = {
    "seq2seq": _seq2seq,
    "classification": _classes,
    "token-classification": _tags,
}
