"""Tokens and labels: which tokens count in the loss, decided by position in the text, never by token id."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from peftkit.data.chat.template import Rendered, Span, adds_bos, turn_end
from peftkit.errors import Problem, UserError

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
    if not tokenizer.is_fast:
        got = f"{type(tokenizer).__name__}, which is written in Python"
        fix = "it cannot tell which characters a token stands for; save the base with a tokenizer.json"
        raise UserError(Problem("base", got, "a tokenizer of the tokenizers library", fix))
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may bring either
    backend.no_padding()
    return list(backend.encode_batch([r.text for r in batch], add_special_tokens=False))


def _without_prefix(piece: str, tokenizer: Any, where: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, characters) of a text in the middle of another.

    Tokenizers after SentencePiece's manner put a blank before whatever they are given. It goes to a
    character that is put there first and taken off again.
    """
    for guard in ("\n", "0", "a"):
        made = tokenizer.backend_tokenizer.encode(guard + piece, add_special_tokens=False)
        place = made.char_to_token(1)
        if place is not None and made.token_to_chars(place)[0] == 1:
            return made.ids[place:], [(a - 1, b - 1) for a, b in made.offsets[place:]]
    got, expected = "an answer that begins inside a token", "a prompt that is tokens of its own"
    raise UserError(Problem(where, got, expected, "use a template with a line break before answers"))


def _in_pieces(batch: Sequence[tuple[Rendered, list[int]]], tokenizer: Any) -> list[_Pieces]:
    """Texts encoded in pieces that end where answers begin."""
    backend = tokenizer.backend_tokenizer
    prefixed = backend.encode("a", add_special_tokens=False).tokens[:1] != ["a"]
    cuts = [sorted({0, *starts, len(rendered.text)}) for rendered, starts in batch]
    texts = [r.text[a:b] for (r, _), places in zip(batch, cuts, strict=True) for a, b in pairwise(places)]
    encoded = iter(backend.encode_batch(texts, add_special_tokens=False))
    found = []
    for (rendered, _), places in zip(batch, cuts, strict=True):
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in pairwise(places):
            made = next(encoded)
            piece, chars = made.ids, made.offsets
            if start and prefixed:
                piece, chars = _without_prefix(rendered.text[start:end], tokenizer, rendered.where)
            ids.extend(piece)
            offsets.extend((a + start, b + start) for a, b in chars)
        found.append(_Pieces(ids, offsets))
    return found


def _token_at(encoded: Encoded, char: int, length: int, num_tokens: int) -> int:
    """The first token that stands for `char` or for what follows it."""
    while char < length:
        token = encoded.char_to_token(char)
        if token is not None:
            return token
        char += 1
    return num_tokens


def _straddles(encoded: Encoded, char: int, length: int) -> bool:
    """Whether a token stands for characters on both sides of `char`."""
    if not 0 < char < length:
        return False
    token = encoded.char_to_token(char)
    chars = None if token is None else encoded.token_to_chars(token)
    return chars is not None and chars[0] < char


def _other_alone(encoded: Encoded, start: int, text: str) -> bool:
    """Whether the text before an answer, encoded alone, is other tokens.

    A token may straddle the start; and many tokenizers split the blanks before a word, but not those at the
    end of a text.
    """
    if _straddles(encoded, start, len(text)):
        return True
    if not text[max(0, start - 2) : start].isspace() or start < 2:
        return False
    chars = encoded.token_to_chars(encoded.char_to_token(start - 2) or 0)
    return chars is not None and chars[1] < start


def _learnt_spans(rendered: Rendered, mask: str) -> tuple[Span, ...]:
    if mask == "all":  # and answers that weigh otherwise than the row
        others = [span for span in rendered.answers if span.weight != rendered.weight]
        return (Span(0, len(rendered.text), rendered.weight), *others)
    return rendered.answers[-1:] if mask == "last-turn" else rendered.answers


@dataclass(frozen=True)
class _Ends:
    """What may end a turn: tokens at which generation stops, and those that `close` a turn in the template.

    `added` are all that stand beside the vocabulary of words.
    """

    stops: frozenset[int]
    close: frozenset[int]
    added: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, stops: frozenset[int]) -> _Ends:
        """What the template writes after an answer closes turns; without one, any special token does."""
        added = tokenizer.added_tokens_decoder
        if tokenizer.chat_template:
            ids = tokenizer.backend_tokenizer.encode(turn_end(tokenizer), add_special_tokens=False).ids
            close = added.keys() & set(ids)
        else:
            close = {number for number, token in added.items() if token.special}
        stops = stops | ({tokenizer.eos_token_id} - {None})
        return cls(stops, stops | close, stops | added.keys() | set(tokenizer.all_special_ids))


def _is_blank(encoded: Encoded, token: int, text: str) -> bool:
    chars = encoded.token_to_chars(token)
    return chars is not None and not text[slice(*chars)].strip()


def _range(rendered: Rendered, encoded: Encoded, ids: list[int], span: Span, ends: _Ends) -> tuple[int, int]:
    """Tokens [first, stop) to learn: those whose characters overlap the span, up to the end of the turn.

    What the template puts after the end token is not learnt: the model stops before it. An end token that
    stands right after the span is. So is a token that has more of the answer than blanks.
    """
    text, size = rendered.text, len(ids)
    length = len(text)
    first = _token_at(encoded, span.start, length, size)
    stop = _token_at(encoded, span.end, length, size)
    chars = encoded.token_to_chars(stop) if stop < size else None
    if chars is not None and text[chars[0] : span.end].strip():  # it straddles the end
        stop += 1
    tail = stop
    while tail > first and (ids[tail - 1] in ends.added or _is_blank(encoded, tail - 1, text)):
        tail -= 1
    closing = [place for place in range(tail, stop) if ids[place] in ends.close]
    if closing:
        halts = [place for place in closing if ids[place] in ends.stops]
        return first, (halts[0] if halts else closing[-1]) + 1
    if stop < size and ids[stop] in ends.close:
        stop += 1
    return first, stop


def _is_open(rendered: Rendered, encoded: Encoded, ids: list[int], stop: int, ends: _Ends) -> bool:
    """Whether a text ends, but for blanks, in what is learnt up to `stop`, and no token closes it."""
    text = rendered.text
    if not stop or not all(_is_blank(encoded, place, text) for place in range(stop, len(ids))):
        return False
    last = stop - 1
    while last > 0 and ids[last] not in ends.close and _is_blank(encoded, last, text):
        last -= 1
    return ids[last] not in ends.close


def _labelled(rendered: Rendered, encoded: Encoded, mask: str, ends: _Ends, eos: int | None) -> Tokenized:
    """A row before a start token is added."""
    ids = encoded.ids
    labels, weights, end = [IGNORED] * len(ids), None, 0
    for span in _learnt_spans(rendered, mask):
        whole = mask == "all" and span.end - span.start == len(rendered.text)
        first, stop = (0, len(ids)) if whole else _range(rendered, encoded, ids, span, ends)
        if first == stop:
            continue
        if span.weight == 0.0:
            labels[first:stop] = [IGNORED] * (stop - first)
            continue
        end = max(end, stop)
        labels[first:stop] = ids[first:stop]
        if span.weight != 1.0 or weights is not None:
            weights = [1.0] * len(ids) if weights is None else weights
            weights[first:stop] = [span.weight] * (stop - first)
    if (not end or labels[end - 1] != IGNORED) and _is_open(rendered, encoded, ids, end, ends):
        if eos is None:
            got, fix = "a tokenizer without an end token", "set eos_token in tokenizer_config.json"
            raise UserError(Problem(rendered.where, got, "a token that ends answers", fix))
        weights = None if weights is None else [*weights, weights[end - 1]]
        ids, labels = [*ids, eos], [*labels, eos]
    return Tokenized(ids, labels, rendered.where, weights)


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

    Where the prompt alone would be other tokens, a text is encoded in pieces that end there: at inference
    the prompt is encoded alone, and training must see the same tokens.
    """
    ends, eos = _Ends.of(tokenizer, stops), tokenizer.eos_token_id
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    made = list(encoded or encode(batch, tokenizer))
    cuts = {}
    for number, (rendered, whole) in enumerate(zip(batch, made, strict=True)):
        answers = rendered.answers[-1:] if mask == "last-turn" else rendered.answers
        starts = [span.start for span in answers]
        if any(_other_alone(whole, start, rendered.text) for start in starts):
            cuts[number] = rendered, starts
    if cuts:
        for number, pieces in zip(cuts, _in_pieces(list(cuts.values()), tokenizer), strict=True):
            made[number] = pieces
    found = []
    for rendered, tokens in zip(batch, made, strict=True):
        row = _labelled(rendered, tokens, mask, ends, eos)
        if bos and row.input_ids[:1] != bos:
            weights = None if row.weights is None else [1.0, *row.weights]
            row = Tokenized([*bos, *row.input_ids], [IGNORED, *row.labels], row.where, weights)
        found.append(row)
    return found
