"""Token ids and labels of all tasks but causal language modelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftkit.archs import Task
from peftkit.data.chat.template import render_prompt
from peftkit.data.formats import Example
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoder = Callable[[Sequence[Example], Any, Mapping[str, int]], list[Tokenized]]


def seq2seq_texts(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return (source text, target text) of an example for an encoder-decoder.

    A chat is rendered with the tokenizer's template where it has one; a single question is taken as it is.
    """
    if example.messages and tokenizer.chat_template:
        return render_prompt(example, tokenizer)
    if example.messages:
        return example.messages[0]["content"], example.messages[-1]["content"]
    return example.prompt, example.completion


def _encode_seq2seq(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, label_ids: Mapping[str, int]
) -> list[Tokenized]:
    """Encode sources as the tokenizer ends them, and targets as labels that end in the eos token."""
    pairs = [seq2seq_texts(example, tokenizer) for example in examples]
    sources = tokenizer([source for source, _ in pairs])["input_ids"]
    targets = tokenizer(text_target=[target for _, target in pairs])["input_ids"]
    end = tokenizer.eos_token_id
    return [
        _with_weight(
            Tokenized(list(s), list(t) if t and t[-1] == end else [*t, end], e.where),
            e.weight * float(e.messages[-1].get("weight", 1.0) if e.messages else 1.0),  # its last turn's, too
        )
        for s, t, e in zip(sources, targets, examples, strict=True)
    ]


def _with_weight(row: Tokenized, weight: float) -> Tokenized:
    """Return the row with its weight at every label; without labels in the loss where the weight is 0."""
    if weight == 0.0:
        return replace(row, labels=[IGNORE_INDEX] * len(row.labels))
    return row if weight == 1.0 else replace(row, weights=[weight] * len(row.labels))


def _encode_classes(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, label_ids: Mapping[str, int]
) -> list[Tokenized]:
    """Encode texts; the only label of a row is its class id."""
    texts = tokenizer([example.prompt for example in examples])["input_ids"]
    return [
        _with_weight(Tokenized(list(text), [label_ids[example.label]], example.where), example.weight)
        for text, example in zip(texts, examples, strict=True)
    ]


def _encode_multi_label(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, label_ids: Mapping[str, int]
) -> list[Tokenized]:
    """Encode texts; the labels of a row are a 1 or 0 for each class, in the order of their ids."""
    texts = tokenizer([example.prompt for example in examples])["input_ids"]
    return [
        _with_weight(Tokenized(list(text), [int(name in e.tags) for name in label_ids], e.where), e.weight)
        for text, e in zip(texts, examples, strict=True)
    ]


def has_several_turns(examples: Sequence[Example]) -> bool:
    """Return True where some chat has more than a question and its answer, so that turns need a template."""
    return any(len(example.messages) > 2 for example in examples)


def _encode_tags(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, label_ids: Mapping[str, int]
) -> list[Tokenized]:
    """Encode words; a word's tag is the label of its first token, its other tokens are ignored."""
    encoded = tokenizer([list(example.words) for example in examples], is_split_into_words=True)
    rows = []
    for number, example in enumerate(examples):
        labels, last_word = [], None
        for word in encoded.word_ids(number):
            labels.append(label_ids[example.tags[word]] if word is not None and word != last_word else IGNORE_INDEX)
            last_word = word
        row = Tokenized(list(encoded["input_ids"][number]), labels, example.where)
        rows.append(_with_weight(row, example.weight))
    return rows


ENCODERS: Mapping[Task, Encoder] = {
    "seq2seq": _encode_seq2seq,
    "classification": _encode_classes,
    "multi-label": _encode_multi_label,
    "token-classification": _encode_tags,
}
