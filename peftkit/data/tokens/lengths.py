"""How long the rows are: counted in tokens, or at most so long where nothing was tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import nlargest

from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.pack import pack
from peftkit.plan import Lengths, Packs, Row

_LONGEST = 64  # rows that are kept by themselves; those after them are taken to be as long as the last


def _lengths(
    tokens: Sequence[int], labels: Sequence[int] | None, learnt: Sequence[int], source: str
) -> Lengths:
    """The lengths of rows from one number a row: tokens, labels of targets where there are any, learnt."""
    ordered = sorted(tokens)
    last = len(ordered) - 1
    first = nlargest(_LONGEST, range(len(tokens)), key=tokens.__getitem__)
    return Lengths(
        longest=tuple(Row(tokens[i], labels[i] if labels else 0, learnt[i]) for i in first),
        deciles=tuple(ordered[round(last * tenth / 10)] for tenth in range(11)),
        num_tokens=sum(tokens),
        num_learnt=sum(learnt),
        source=source,
        num_rows=len(tokens),
    )


def longest(lengths: Lengths | None) -> Row | None:
    """The longest side of each kind, of different rows perhaps."""
    if lengths is None:
        return None
    rows = lengths.longest
    return Row(rows[0].num_tokens, max(row.num_labels for row in rows), rows[0].num_learnt)


def counted(rows: Sequence[Tokenized], task: str, room: int = 0) -> Lengths | None:
    """The lengths of tokenized rows, and of packs of at most `room` tokens; None where there are no rows."""
    from peftkit.data.tokens.store import Counts

    made = Counts.of(rows)
    tokens, learnt = made.tokens.tolist(), made.learnt.tolist()
    if not tokens:
        return None
    lengths = _lengths(tokens, made.labels.tolist() if task == "seq2seq" else None, learnt, "counted")
    fits = task == "causal-lm" and lengths.longest[0].num_tokens <= room
    return replace(lengths, packs=_packs(tokens, learnt, room)) if fits else lengths


def _packs(tokens: Sequence[int], learnt: Sequence[int], room: int) -> Packs:
    """The rows laid together, as training lays them."""
    packs = pack(tokens, room)
    whole = [Row(sum(tokens[i] for i in rows), 0, sum(learnt[i] for i in rows)) for rows in packs]
    return Packs(room, len(packs), tuple(nlargest(_LONGEST, whole, key=lambda row: row.num_tokens)))


def at_most(asked: Sequence[int], answered: Sequence[int], task: str) -> Lengths | None:
    """Bounds without a tokenizer: a token is at least one byte of text. None where there are no rows."""
    if not len(asked):
        return None
    if task == "seq2seq":
        return _lengths(asked, answered, asked, "at most")
    whole = [one + other for one, other in zip(asked, answered, strict=True)]
    return _lengths(whole, None, whole, "at most")
