"""Row lengths: counted in tokens, or bounded by bytes of text where nothing was tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import nlargest

from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.pack import pack_rows
from peftkit.plan import Lengths, PackLengths, RowLengths

_NUM_LONGEST = 64  # rows that are kept by themselves; those after them are taken to be as long as the last


def _summarize_lengths(
    tokens: Sequence[int], labels: Sequence[int] | None, loss_tokens: Sequence[int], source: str
) -> Lengths:
    """Summarize row lengths from one number a row: tokens, target labels where there are any, loss tokens."""
    ordered = sorted(tokens)
    last = len(ordered) - 1
    longest_rows = nlargest(_NUM_LONGEST, range(len(tokens)), key=tokens.__getitem__)
    return Lengths(
        longest=tuple(RowLengths(tokens[i], labels[i] if labels else 0, loss_tokens[i]) for i in longest_rows),
        deciles=tuple(ordered[round(last * decile / 10)] for decile in range(11)),
        num_tokens=sum(tokens),
        num_learnt=sum(loss_tokens),
        source=source,
        num_rows=len(tokens),
    )


def longest_sides(lengths: Lengths | None) -> RowLengths | None:
    """Return the longest side of each kind, perhaps of different rows; None without lengths."""
    if lengths is None:
        return None
    rows = lengths.longest
    return RowLengths(rows[0].num_tokens, max(row.num_labels for row in rows), rows[0].num_learnt)


def count_lengths(rows: Sequence[Tokenized], task: str, room: int = 0) -> Lengths | None:
    """Count the lengths of tokenized rows, and of packs of at most `room` tokens; None without rows."""
    from peftkit.data.tokens.store import Counts

    counts = Counts.of(rows)
    tokens, loss_tokens = counts.tokens.tolist(), counts.learnt.tolist()
    if not tokens:
        return None
    lengths = _summarize_lengths(tokens, counts.labels.tolist() if task == "seq2seq" else None, loss_tokens, "counted")
    fits = task == "causal-lm" and lengths.longest[0].num_tokens <= room
    if not fits:
        return lengths
    packs = pack_rows(tokens, room)
    packed_rows = [RowLengths(sum(tokens[i] for i in rows), 0, sum(loss_tokens[i] for i in rows)) for rows in packs]
    fullest = tuple(nlargest(_NUM_LONGEST, packed_rows, key=lambda row: row.num_tokens))
    return replace(lengths, packs=PackLengths(room, len(packs), fullest))


def bound_lengths(prompt_bytes: Sequence[int], answer_bytes: Sequence[int], task: str) -> Lengths | None:
    """Bound row lengths without a tokenizer: a token is at least one byte of text; None without rows."""
    if not len(prompt_bytes):
        return None
    if task == "seq2seq":
        return _summarize_lengths(prompt_bytes, answer_bytes, prompt_bytes, "at most")
    total_bytes = [prompt + answer for prompt, answer in zip(prompt_bytes, answer_bytes, strict=True)]
    return _summarize_lengths(total_bytes, None, total_bytes, "at most")
