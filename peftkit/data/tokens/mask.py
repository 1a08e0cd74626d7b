"""Labels and loss mask: which tokens are in the loss, decided by position in the text, never by token id."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from peftkit.data.chat.template import Rendered, Span, adds_bos, text_after_answer
from peftkit.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # torch's cross entropy leaves these labels out


@dataclass(frozen=True)
class Tokenized:
    """Token ids and labels of one example: of equal length for decoders and tags, else a target or a class.

    `weights` has one number per label where rows or turns have different weights in the loss.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    weights: list[float] | None = None

    @property
    def length(self) -> int:
        """Return the number of tokens of the longer side."""
        return max(len(self.input_ids), len(self.labels))

    @property
    def num_learnt(self) -> int:
        """Return the number of labels in the loss."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    def cut(self, start: int, stop: int) -> Tokenized:
        """Return tokens [start, stop) of a decoder's row."""
        weights = None if self.weights is None else self.weights[start:stop]
        return Tokenized(self.input_ids[start:stop], self.labels[start:stop], self.where, weights)


class Encoding(Protocol):
    """A text's token ids with their character offsets, as `tokenizers.Encoding` has them."""

    ids: list[int]

    def char_to_token(self, char_pos: int) -> int | None: ...
    def token_to_chars(self, token_index: int) -> tuple[int, int] | None: ...


class _JoinedEncoding:
    """Encoding of a text that was encoded in pieces."""

    def __init__(self, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        self.ids, self._offsets = ids, offsets
        self._starts = [start for start, _ in offsets]

    def char_to_token(self, char_pos: int) -> int | None:
        token = bisect_right(self._starts, char_pos) - 1
        while token > 0 and self._starts[token - 1] == self._starts[token]:
            token -= 1
        return token if token >= 0 and char_pos < self._offsets[token][1] else None

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        return self._offsets[token_index]


def encode(batch: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
    """Encode texts with a fast tokenizer, on all cores and without the GIL.

    Raises UserError for a tokenizer without character offsets (one written in Python).
    """
    if not tokenizer.is_fast:
        got = f"{type(tokenizer).__name__}, a slow tokenizer (written in Python)"
        fix = "it has no character offsets; save the base with a tokenizer.json"
        raise UserError(Problem("base", got, "a fast tokenizer (tokenizers library)", fix))
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may bring either
    backend.no_padding()
    return list(backend.encode_batch([r.text for r in batch], add_special_tokens=False))


def _encode_continuation(
    piece: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode a text that continues another one. Returns (ids, character offsets).

    SentencePiece-style tokenizers put a blank before any text. It goes to a guard character that is put first
    and taken off again. Raises UserError where every guard merges with the text.
    """
    for prefix in ("\n", "0", "a"):
        encoding = tokenizer.backend_tokenizer.encode(prefix + piece, add_special_tokens=False)
        token = encoding.char_to_token(1)
        if token is not None and encoding.token_to_chars(token)[0] == 1:
            return encoding.ids[token:], [(a - 1, b - 1) for a, b in encoding.offsets[token:]]
    got, expected = "an answer that begins inside a token", "a prompt that ends at a token boundary"
    raise UserError(Problem(where, got, expected, "use a template with a line break before answers"))


def _encode_in_pieces(
    batch: Sequence[tuple[Rendered, list[int]]], tokenizer: PreTrainedTokenizerBase
) -> list[_JoinedEncoding]:
    """Encode texts in pieces that end where answers begin."""
    backend = tokenizer.backend_tokenizer
    adds_prefix = backend.encode("a", add_special_tokens=False).tokens[:1] != ["a"]
    cuts = [sorted({0, *starts, len(rendered.text)}) for rendered, starts in batch]
    texts = [r.text[a:b] for (r, _), edges in zip(batch, cuts, strict=True) for a, b in pairwise(edges)]
    encoded = iter(backend.encode_batch(texts, add_special_tokens=False))
    encodings = []
    for (rendered, _), edges in zip(batch, cuts, strict=True):
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in pairwise(edges):
            encoding = next(encoded)
            piece_ids, piece_offsets = encoding.ids, encoding.offsets
            if start and adds_prefix:
                piece_ids, piece_offsets = _encode_continuation(rendered.text[start:end], tokenizer, rendered.where)
            ids.extend(piece_ids)
            offsets.extend((a + start, b + start) for a, b in piece_offsets)
        encodings.append(_JoinedEncoding(ids, offsets))
    return encodings


def _token_at(encoded: Encoding, char: int, length: int, num_tokens: int) -> int:
    """Return the first token that covers `char` or a later character."""
    while char < length:
        token = encoded.char_to_token(char)
        if token is not None:
            return token
        char += 1
    return num_tokens


def _tokenizes_differently(encoded: Encoding, start: int, text: str) -> bool:
    """Return True where the text before an answer gives other tokens when it is encoded alone.

    A token may straddle the start; and many tokenizers split the blanks before a word, but not those at the
    end of a text.
    """
    length = len(text)
    if not 0 < start < length:
        straddles = False
    else:
        token = encoded.char_to_token(start)
        chars = None if token is None else encoded.token_to_chars(token)
        straddles = chars is not None and chars[0] < start
    if straddles:
        return True
    if not text[max(0, start - 2) : start].isspace() or start < 2:
        return False
    chars = encoded.token_to_chars(encoded.char_to_token(start - 2) or 0)
    return chars is not None and chars[1] < start


@dataclass(frozen=True)
class _EndTokens:
    """Tokens that may end a turn: `stops` end generation, `turn_ends` also a turn in the template.

    `added_tokens` are all that stand beside the tokenizer's vocabulary of words.
    """

    stops: frozenset[int]
    turn_ends: frozenset[int]
    added_tokens: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]) -> _EndTokens:
        """Find the end tokens of a tokenizer.

        With a chat template, the added tokens that it writes after an answer end a turn; without one, any
        special token.
        """
        added_tokens = tokenizer.added_tokens_decoder
        if tokenizer.chat_template:
            ids = tokenizer.backend_tokenizer.encode(text_after_answer(tokenizer), add_special_tokens=False).ids
            turn_ends = added_tokens.keys() & set(ids)
        else:
            turn_ends = {token_id for token_id, token in added_tokens.items() if token.special}
        stops = stops | ({tokenizer.eos_token_id} - {None})
        return cls(stops, stops | turn_ends, stops | added_tokens.keys() | set(tokenizer.all_special_ids))


def _is_blank(encoded: Encoding, token: int, text: str) -> bool:
    chars = encoded.token_to_chars(token)
    return chars is not None and not text[slice(*chars)].strip()


def _loss_range(rendered: Rendered, encoded: Encoding, ids: list[int], span: Span, ends: _EndTokens) -> tuple[int, int]:
    """Return the tokens [first, stop) of a span that are in the loss.

    Those are the tokens whose characters overlap the span, up to the end of the turn: also an end token right
    after the span, and a token that straddles the span's end with more than blanks of the answer in it. Not
    what the template writes after the end token: the model stops before it.

    Example, ChatML, with the span of the answer "Four." or of "Four.<|im_end|>" and a line break:

    token     <|im_start|>  assistant  LF  Four  .   <|im_end|>  LF
    position  7             8          9   10    11  12          13

    -> (10, 13): "Four", "." and <|im_end|> are in the loss, the line break after it is not
    """
    text, num_tokens = rendered.text, len(ids)
    length = len(text)
    first = _token_at(encoded, span.start, length, num_tokens)
    stop = _token_at(encoded, span.end, length, num_tokens)
    chars = encoded.token_to_chars(stop) if stop < num_tokens else None
    if chars is not None and text[chars[0] : span.end].strip():  # it straddles the end
        stop += 1
    tail = stop
    while tail > first and (ids[tail - 1] in ends.added_tokens or _is_blank(encoded, tail - 1, text)):
        tail -= 1
    end_positions = [position for position in range(tail, stop) if ids[position] in ends.turn_ends]
    if end_positions:
        stop_positions = [position for position in end_positions if ids[position] in ends.stops]
        return first, (stop_positions[0] if stop_positions else end_positions[-1]) + 1
    if stop < num_tokens and ids[stop] in ends.turn_ends:
        stop += 1
    return first, stop


def _lacks_end_token(rendered: Rendered, encoded: Encoding, ids: list[int], stop: int, ends: _EndTokens) -> bool:
    """Return True where the loss reaches the text's end, but for blanks, and no end token closes it."""
    text = rendered.text
    if not stop or not all(_is_blank(encoded, position, text) for position in range(stop, len(ids))):
        return False
    last_position = stop - 1
    while last_position > 0 and ids[last_position] not in ends.turn_ends and _is_blank(encoded, last_position, text):
        last_position -= 1
    return ids[last_position] not in ends.turn_ends


def _label_row(rendered: Rendered, encoded: Encoding, mask: str, ends: _EndTokens, eos: int | None) -> Tokenized:
    """Label one encoded text, and add the eos token where an answer lacks its end. Adds no bos token."""
    ids = encoded.ids
    labels, weights, loss_end = [IGNORE_INDEX] * len(ids), None, 0
    if mask == "all":  # and answers that weigh otherwise than the row
        reweighted = [span for span in rendered.answers if span.weight != rendered.weight]
        learnt_spans = (Span(0, len(rendered.text), rendered.weight), *reweighted)
    else:
        learnt_spans = rendered.answers[-1:] if mask == "last-turn" else rendered.answers
    for span in learnt_spans:
        is_whole_text = mask == "all" and span.end - span.start == len(rendered.text)
        first, stop = (0, len(ids)) if is_whole_text else _loss_range(rendered, encoded, ids, span, ends)
        if first == stop:
            continue
        if span.weight == 0.0:
            labels[first:stop] = [IGNORE_INDEX] * (stop - first)
            continue
        loss_end = max(loss_end, stop)
        labels[first:stop] = ids[first:stop]
        if span.weight != 1.0 or weights is not None:
            weights = [1.0] * len(ids) if weights is None else weights
            weights[first:stop] = [span.weight] * (stop - first)
    if (not loss_end or labels[loss_end - 1] != IGNORE_INDEX) and _lacks_end_token(
        rendered, encoded, ids, loss_end, ends
    ):
        if eos is None and mask == "all":  # raw text goes on: it has no end
            return Tokenized(ids, labels, rendered.where, weights)
        if eos is None:
            got, fix = "a tokenizer without an eos token", "name one: data.chat.end_token: TOKEN"
            raise UserError(Problem(rendered.where, got, "an eos token to end answers", fix))
        weights = None if weights is None else [*weights, weights[loss_end - 1]]
        ids, labels = [*ids, eos], [*labels, eos]
    return Tokenized(ids, labels, rendered.where, weights)


def tokenize(
    batch: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask: str,
    stops: frozenset[int] = frozenset(),
    encoded: Sequence[Encoding] | None = None,
) -> list[Tokenized]:
    """Tokenize and label rendered examples.

    A token is in the loss where its characters overlap an answer span. Each answer ends in an end-of-turn or
    eos token that is in the loss too; where the text has none, the tokenizer's eos token is added. `stops`
    are tokens at which generation stops, `encoded` the result of `encode` for the batch.

    Where the prompt alone would give other tokens, a text is encoded in pieces that end there: at inference
    the prompt is encoded alone, and training must see the same tokens.
    """
    ends, eos = _EndTokens.of(tokenizer, stops), tokenizer.eos_token_id
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    encodings = list(encoded or encode(batch, tokenizer))
    split_texts = {}
    for number, (rendered, encoding) in enumerate(zip(batch, encodings, strict=True)):
        answers = rendered.answers[-1:] if mask == "last-turn" else rendered.answers
        starts = [span.start for span in answers]
        if any(_tokenizes_differently(encoding, start, rendered.text) for start in starts):
            split_texts[number] = rendered, starts
    if split_texts:
        for number, pieces in zip(split_texts, _encode_in_pieces(list(split_texts.values()), tokenizer), strict=True):
            encodings[number] = pieces
    rows = []
    for rendered, row_encoding in zip(batch, encodings, strict=True):
        row = _label_row(rendered, row_encoding, mask, ends, eos)
        if bos and row.input_ids[:1] != bos:
            weights = None if row.weights is None else [1.0, *row.weights]
            row = Tokenized([*bos, *row.input_ids], [IGNORE_INDEX, *row.labels], row.where, weights)
        rows.append(row)
    return rows
