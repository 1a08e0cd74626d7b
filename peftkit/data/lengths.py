"""How long the rows are: counted in tokens, or at most so long where nothing was tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peftkit.data.formats import Example
from peftkit.data.mask import Tokenized
from peftkit.data.pack import pack
from peftkit.plan import Lengths, Packs, Row

_LONGEST = 64  # rows that are kept by themselves; those after them are taken to be as long as the last
_TEMPLATE_BYTES = 32  # what a chat template may add to a turn, in tokens


def _lengths(rows: Sequence[Row], source: str) -> Lengths:
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    last = len(ordered) - 1
    return Lengths(
        longest=tuple(reversed(ordered[-_LONGEST:])),
        deciles=tuple(ordered[round(last * tenth / 10)].num_tokens for tenth in range(11)),
        num_tokens=sum(row.num_tokens for row in rows),
        num_learnt=sum(row.num_learnt for row in rows),
        source=source,
        num_rows=len(rows),
    )


def longest(lengths: Lengths | None) -> Row | None:
    """The longest side of each kind, of different rows perhaps."""
    if lengths is None:
        return None
    rows = lengths.longest
    return Row(rows[0].num_tokens, max(row.num_labels for row in rows), rows[0].num_learnt)


def counted(rows: Sequence[Tokenized], task: str, room: int = 0) -> Lengths | None:
    """The lengths of tokenized rows, and of packs of at most `room` tokens; None where there are no rows."""
    found = [
        Row(len(row.input_ids), len(row.labels) if task == "seq2seq" else 0, row.num_learnt) for row in rows
    ]
    if not found:
        return None
    lengths = _lengths(found, "counted")
    fits = task == "causal-lm" and lengths.longest[0].num_tokens <= room
    return replace(lengths, packs=_packs(found, room)) if fits else lengths


def _packs(rows: Sequence[Row], room: int) -> Packs:
    """The rows laid together, as training lays them."""
    packs = [[rows[i] for i in numbers] for numbers in pack([row.num_tokens for row in rows], room)]
    whole = [Row(sum(r.num_tokens for r in rows), 0, sum(r.num_learnt for r in rows)) for rows in packs]
    fullest = sorted(whole, key=lambda row: row.num_tokens, reverse=True)[:_LONGEST]
    return Packs(room, len(packs), tuple(fullest))


def at_most(examples: Sequence[Example], task: str) -> Lengths | None:
    """Bounds without a tokenizer: a token is at least one byte of text. None where there are no rows."""
    found = []
    for example in examples:
        turns = [m["content"] for m in example.messages]
        asked = [example.prompt, *example.words, *turns]
        answered = [example.completion]
        size = sum(len(text.encode()) for text in asked) + _TEMPLATE_BYTES * max(1, len(turns))
        target = sum(len(text.encode()) for text in answered) + 1
        whole = size if task == "seq2seq" else size + target
        found.append(Row(whole, target if task == "seq2seq" else 0, whole))
    return _lengths(found, "at most") if found else None
