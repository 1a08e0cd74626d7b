"""Tokens and labels: which tokens count in the loss, decided by position in the text, never by token id."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from peftkit.data.template import Rendered, Span, adds_bos

IGNORED = -100  # torch's cross entropy leaves these labels out


@dataclass(frozen=True)
class Tokenized:
    """One example as ids and labels: of equal length for decoders and tags, a target or a class otherwise.

    `weights` has one number per label where rows or turns do not weigh alike.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    weights: list[float] | None = None

    @property
    def length(self) -> int:
        """Tokens on the longer side."""
        return max(len(self.input_ids), len(self.labels))

    @property
    def num_learnt(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)

    def cut(self, start: int, stop: int) -> Tokenized:
        """Tokens [start, stop) of a decoder's row."""
        weights = None if self.weights is None else self.weights[start:stop]
        return Tokenized(self.input_ids[start:stop], self.labels[start:stop], self.where, weights)


class Encoded(Protocol):
    """A text's tokens and the characters that they stand for, as the tokenizers library has them."""

    ids: list[int]

    def char_to_token(self, char_pos: int) -> int | None: ...
    def token_to_chars(self, token_index: int) -> tuple[int, int] | None: ...


class _Pieces:
    """A text that was encoded in pieces, put together."""

    def __init__(self, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        self.ids, self._offsets = ids, offsets
        self._starts = [start for start, _ in offsets]

    def char_to_token(self, char_pos: int) -> int | None:
        place = bisect_right(self._starts, char_pos) - 1
        while place > 0 and self._starts[place - 1] == self._starts[place]:
            place -= 1
        return place if place >= 0 and char_pos < self._offsets[place][1] else None

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        return self._offsets[token_index]


def encode(batch: Sequence[Rendered], tokenizer: Any) -> list[Encoded]:
    """The tokens of each text. It holds no lock while it works, on all cores."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may bring either
    backend.no_padding()
    return list(backend.encode_batch([r.text for r in batch], add_special_tokens=False))


def _in_pieces(rendered: Rendered, tokenizer: Any) -> _Pieces:
    """A text encoded in pieces that end where answers begin."""
    cuts = sorted({0, *(span.start for span in rendered.answers), len(rendered.text)})
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in pairwise(cuts):
        piece = tokenizer(rendered.text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        ids.extend(piece["input_ids"])
        offsets.extend((a + start, b + start) for a, b in piece["offset_mapping"])
    return _Pieces(ids, offsets)


def _token_at(encoded: Encoded, char: int, length: int) -> int:
    """The first token that stands for `char` or for what follows it."""
    while char < length:
        token = encoded.char_to_token(char)
        if token is not None:
            return token
        char += 1
    return len(encoded.ids)


def _straddles(encoded: Encoded, char: int, length: int) -> bool:
    """Whether a token stands for characters on both sides of `char`."""
    if not 0 < char < length:
        return False
    token = encoded.char_to_token(char)
    chars = None if token is None else encoded.token_to_chars(token)
    return chars is not None and chars[0] < char


def _learnt_spans(rendered: Rendered, mask: str) -> tuple[Span, ...]:
    if mask == "all":
        weight = rendered.answers[-1].weight if rendered.answers else 1.0
        return (Span(0, len(rendered.text), weight),)
    return rendered.answers[-1:] if mask == "last-turn" else rendered.answers


@dataclass(frozen=True)
class _Ends:
    """What may end a turn: `special` tokens, and among them those at which generation stops."""

    special: frozenset[int]
    stops: frozenset[int]


def _is_blank(encoded: Encoded, token: int, text: str) -> bool:
    chars = encoded.token_to_chars(token)
    return chars is not None and not text[slice(*chars)].strip()


def _range(rendered: Rendered, encoded: Encoded, span: Span, ends: _Ends) -> tuple[int, int]:
    """Tokens [first, stop) to learn: those whose characters overlap the span, up to the end of the turn.

    Blanks that the template puts after the end token are not learnt: the model stops before them. An end
    token that stands right after the span is.
    """
    text, ids = rendered.text, encoded.ids
    first = _token_at(encoded, span.start, len(text))
    stop = _token_at(encoded, span.end, len(text))
    if stop < len(ids) and _straddles(encoded, span.end, len(text)):
        stop += 1
    last = stop - 1
    while last > first and ids[last] not in ends.special and _is_blank(encoded, last, text):
        last -= 1
    if last >= first and ids[last] in ends.special:
        return first, last + 1
    if stop < len(ids) and ids[stop] in ends.stops:
        stop += 1
    return first, stop


def _ends(rendered: Rendered, encoded: Encoded, last: int, special: frozenset[int]) -> bool:
    """Whether the text ends in a special token at or after `last`, or before it with only blanks between."""
    if any(token in special for token in encoded.ids[last:]):
        return True
    while last > 0 and _is_blank(encoded, last, rendered.text):
        last -= 1
        if encoded.ids[last] in special:
            return True
    return False


def _labelled(
    rendered: Rendered, encoded: Encoded, mask: str, ends: _Ends
) -> tuple[list[int], list[int], list[float] | None]:
    """(ids, labels, weights) before a start or end token is added."""
    ids = list(encoded.ids)
    labels, weights = [IGNORED] * len(ids), None
    for span in _learnt_spans(rendered, mask):
        if span.weight == 0.0:
            continue
        first, stop = (0, len(ids)) if mask == "all" else _range(rendered, encoded, span, ends)
        labels[first:stop] = ids[first:stop]
        if span.weight != 1.0 or weights is not None:
            weights = [1.0] * len(ids) if weights is None else weights
            weights[first:stop] = [span.weight] * (stop - first)
    return ids, labels, weights


def tokenize(
    batch: Sequence[Rendered],
    tokenizer: Any,
    *,
    mask: str,
    stops: frozenset[int] = frozenset(),
    encoded: Sequence[Encoded] | None = None,
) -> list[Tokenized]:
    """Ids and labels of rendered examples.

    A token is learnt where its characters overlap an answer span. Each answer ends in an end-of-turn or end
    token that is learnt too; where the text brings none, the tokenizer's end token is added. `stops` are
    tokens at which generation stops, `encoded` what `encode` gave for the batch.

    Where a token would straddle the start of an answer, that text is encoded in pieces that end there: at
    inference the prompt is encoded alone, and training must see the same prompt tokens.
    """
    eos = tokenizer.eos_token_id
    special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
    ends = _Ends(special, stops | {eos})
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    found = []
    for rendered, whole in zip(batch, encoded or encode(batch, tokenizer), strict=True):
        length = len(rendered.text)
        cut = any(_straddles(whole, span.start, length) for span in rendered.answers)
        made = _in_pieces(rendered, tokenizer) if cut else whole
        ids, labels, weights = _labelled(rendered, made, mask, ends)
        last = next((i for i in range(len(ids) - 1, -1, -1) if labels[i] != IGNORED), None)
        if last is not None and not _ends(rendered, made, last, special):
            ids.append(eos)
            labels.append(eos)
            weights = None if weights is None else [*weights, weights[last]]
        if bos and ids[:1] != bos:
            ids.insert(0, bos[0])
            labels.insert(0, IGNORED)
            weights = None if weights is None else [1.0, *weights]
        found.append(Tokenized(ids, labels, rendered.where, weights))
    return found
