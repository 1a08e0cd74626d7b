"""Tokens and labels: which tokens count in the loss, decided by position in the text, never by token id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from peftkit.data.template import Rendered, Span, adds_bos

IGNORED = -100  # torch's cross entropy leaves these labels out


@dataclass(frozen=True)
class Tokenized:
    """One example as ids and labels: of equal length for decoders and tags, a target or a class otherwise."""

    input_ids: list[int]
    labels: list[int]
    where: str

    @property
    def length(self) -> int:
        """Tokens on the longer side."""
        return max(len(self.input_ids), len(self.labels))

    @property
    def num_learnt(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def _learnt_spans(rendered: Rendered, mask: str) -> tuple[Span, ...]:
    if mask == "all":
        return (Span(0, len(rendered.text)),)
    return rendered.answers[-1:] if mask == "last-turn" else rendered.answers


def _without_tail(
    learnt: list[int],
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    text: str,
    special: frozenset[int],
) -> list[int]:
    """Drop blanks that the template puts after the end-of-turn token: the model stops before them."""
    kept = list(learnt)
    while kept and ids[kept[-1]] not in special and not text[slice(*offsets[kept[-1]])].strip():
        kept.pop()
    return kept if kept and ids[kept[-1]] in special else learnt


def _ends(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    text: str,
    last: int,
    special: frozenset[int],
) -> bool:
    """Whether the text ends in a special token at or after `last`, or before it with only blanks between."""
    if any(token in special for token in ids[last:]):
        return True
    while last > 0 and not text[slice(*offsets[last])].strip():
        last -= 1
        if ids[last] in special:
            return True
    return False


Encoded = tuple[list[int], list[tuple[int, int]]]


def _encode(batch: Sequence[Rendered], tokenizer: Any) -> list[Encoded]:
    """Ids and character offsets of each text.

    Where a token would straddle the start of an answer, that text is encoded in pieces that end there: at
    inference the prompt is encoded alone, and training must see the same prompt tokens.
    """
    joint = tokenizer([r.text for r in batch], add_special_tokens=False, return_offsets_mapping=True)
    found: list[Encoded] = []
    for rendered, ids, offsets in zip(batch, joint["input_ids"], joint["offset_mapping"], strict=True):
        starts = {span.start for span in rendered.answers}
        if any(start < cut < end for start, end in offsets for cut in starts):
            found.append(_encode_in_pieces(rendered, tokenizer))
        else:
            found.append((list(ids), list(offsets)))
    return found


def _encode_in_pieces(rendered: Rendered, tokenizer: Any) -> Encoded:
    cuts = sorted({0, *(span.start for span in rendered.answers), len(rendered.text)})
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in pairwise(cuts):
        piece = tokenizer(rendered.text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        ids.extend(piece["input_ids"])
        offsets.extend((a + start, b + start) for a, b in piece["offset_mapping"])
    return ids, offsets


def tokenize(batch: Sequence[Rendered], tokenizer: Any, *, mask: str) -> list[Tokenized]:
    """Ids and labels of rendered examples.

    A token is learnt where its characters overlap an answer span. Each answer ends in an end-of-turn or end
    token that is learnt too; where the text brings none, the tokenizer's end token is added.
    """
    special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    found = []
    for rendered, (ids, offsets) in zip(batch, _encode(batch, tokenizer), strict=True):
        labels = [IGNORED] * len(ids)
        for span in _learnt_spans(rendered, mask):
            inside = [i for i, (start, end) in enumerate(offsets) if end > span.start and start < span.end]
            if mask != "all":
                inside = _without_tail(inside, ids, offsets, rendered.text, special)
            for i in inside:
                labels[i] = ids[i]
        last = next((i for i in reversed(range(len(ids))) if labels[i] != IGNORED), None)
        if last is not None and not _ends(ids, offsets, rendered.text, last, special):
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        if bos and ids[:1] != bos:
            ids.insert(0, bos[0])
            labels.insert(0, IGNORED)
        found.append(Tokenized(ids, labels, rendered.where))
    return found
