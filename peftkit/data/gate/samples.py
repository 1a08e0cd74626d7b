"""Rows as the model sees them: every token with its text, and whether it is masked, learnt or special."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftkit.data.tokens.mask import IGNORED, Tokenized

Kind = Literal["masked", "learnt", "special", "learnt special"]


@dataclass(frozen=True)
class Piece:
    """One token, or the few that one character is made of."""

    text: str
    kind: Kind
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One row, token by token."""

    where: str
    set: str  # "train" | "eval"
    pieces: tuple[Piece, ...]


def _pieces(ids: Sequence[int], learnt: Sequence[bool], tokenizer: Any) -> list[Piece]:
    special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
    found: list[Piece] = []
    waiting: list[int] = []
    for place, (token, is_learnt) in enumerate(zip(ids, learnt, strict=True)):
        if token in special:
            text = str(tokenizer.convert_ids_to_tokens(token))
            found.append(Piece(text, "learnt special" if is_learnt else "special", (token,)))
            continue
        waiting.append(token)
        before = [ids[place - len(waiting)]] if place >= len(waiting) else []
        text = tokenizer.decode([*before, *waiting])[len(tokenizer.decode(before)) :]  # keeps leading blanks
        following = place + 1 < len(ids) and ids[place + 1] not in special
        if text.endswith("\ufffd") and following and len(waiting) < 4:
            continue  # bytes of one character
        found.append(Piece(text, "learnt" if is_learnt else "masked", tuple(waiting)))
        waiting = []
    return found


def sample_of(row: Tokenized, name: str, tokenizer: Any, *, task: str, labels: Sequence[str]) -> Sample:
    """A row to show. A class or a target that the model writes follows what it reads."""
    if task == "causal-lm":
        weights = row.weights or [1.0] * len(row.labels)
        learnt = [label != IGNORED and w > 0 for label, w in zip(row.labels, weights, strict=True)]
        return Sample(row.where, name, tuple(_pieces(row.input_ids, learnt, tokenizer)))
    if task == "token-classification":
        learnt = [label != IGNORED for label in row.labels]
        return Sample(row.where, name, tuple(_pieces(row.input_ids, learnt, tokenizer)))
    read = _pieces(row.input_ids, [False] * len(row.input_ids), tokenizer)
    if task == "classification":
        answer = [Piece(f" -> {labels[row.labels[0]]}", "learnt", ())]
    else:
        answer = [Piece(" -> ", "masked", ()), *_pieces(row.labels, [True] * len(row.labels), tokenizer)]
    return Sample(row.where, name, (*read, *answer))
