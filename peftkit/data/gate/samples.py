"""Samples of tokenized rows: every token with its text, and whether it is masked, in the loss or special."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftkit.data.formats.classes import show_classes
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenKind = Literal["masked", "learnt", "special", "learnt special"]


@dataclass(frozen=True)
class Piece:
    """One token, or the few tokens that one character is made of."""

    text: str
    kind: TokenKind
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One row, token by token."""

    where: str
    set: str  # "train" | "eval"
    pieces: tuple[Piece, ...]


def _pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
    pieces: list[Piece] = []
    pending: list[int] = []
    for position, (token, is_trained) in enumerate(zip(ids, trained, strict=True)):
        if token in special:
            text = str(tokenizer.convert_ids_to_tokens(token))
            pieces.append(Piece(text, "learnt special" if is_trained else "special", (token,)))
            continue
        pending.append(token)
        context = [ids[position - len(pending)]] if position >= len(pending) else []
        text = tokenizer.decode([*context, *pending])[len(tokenizer.decode(context)) :]  # keeps leading blanks
        has_next = position + 1 < len(ids) and ids[position + 1] not in special
        if text.endswith("\ufffd") and has_next and len(pending) < 4:
            continue  # bytes of one character
        pieces.append(Piece(text, "learnt" if is_trained else "masked", tuple(pending)))
        pending = []
    return pieces


def make_sample(
    row: Tokenized, name: str, tokenizer: PreTrainedTokenizerBase, *, task: str, labels: Sequence[str]
) -> Sample:
    """Return a row token by token; a class, or the target of seq2seq, follows the input after ` -> `."""
    if task == "causal-lm":
        weights = row.weights or [1.0] * len(row.labels)
        trained = [label != IGNORE_INDEX and weight > 0 for label, weight in zip(row.labels, weights, strict=True)]
        return Sample(row.where, name, tuple(_pieces(row.input_ids, trained, tokenizer)))
    if task == "token-classification":
        trained = [label != IGNORE_INDEX for label in row.labels]
        return Sample(row.where, name, tuple(_pieces(row.input_ids, trained, tokenizer)))
    input_pieces = _pieces(row.input_ids, [False] * len(row.input_ids), tokenizer)
    if task == "classification":
        target_pieces = [Piece(f" -> {labels[row.labels[0]]}", "learnt", ())]
    elif task == "multi-label":
        names = [name for name, is_class in zip(labels, row.labels, strict=True) if is_class == 1]
        target_pieces = [Piece(f" -> {show_classes(names)}", "learnt", ())]
    else:
        target_pieces = [Piece(" -> ", "masked", ()), *_pieces(row.labels, [True] * len(row.labels), tokenizer)]
    return Sample(row.where, name, (*input_pieces, *target_pieces))
