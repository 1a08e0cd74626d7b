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

Sizes = Sequence[tuple[int, int]]


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
    from peftkit.data.store import Counts

    made = Counts.of(rows)
    columns = (made.tokens.tolist(), made.labels.tolist(), made.learnt.tolist())
    found = [
        Row(tokens, labels if task == "seq2seq" else 0, learnt)
        for tokens, labels, learnt in zip(*columns, strict=True)
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


def sizes_of(example: Example) -> tuple[int, int]:
    """(bytes that are asked, bytes that are answered last) of an example, with what a template may add."""
    turns = [m["content"] for m in example.messages]
    asked = [example.prompt, *example.words, *turns[:-1]]
    answered = turns[-1] if turns else example.completion
    extra = _TEMPLATE_BYTES * max(1, len(turns))
    return sum(len(text.encode()) for text in asked) + extra, len(answered.encode()) + 1


def at_most(sizes: Sizes, task: str) -> Lengths | None:
    """Bounds without a tokenizer: a token is at least one byte of text. None where there are no rows."""
    if task == "seq2seq":
        found = [Row(asked, answered, asked) for asked, answered in sizes]
    else:
        found = [Row(asked + answered, 0, asked + answered) for asked, answered in sizes]
    return _lengths(found, "at most") if found else None
