"""SentencePiece's BPE: llama.cpp joins the two neighbours whose union scores best, whatever pair they are.

tokenizers joins by the rank of the pair. The two agree where every way to split a token is a merge, and all
merges of one token stand together: then minus the place of a token in that order is its score. That is how
transformers writes Llama 2, Mistral, Gemma and Phi-3. A vocabulary that `tokenizers` trained has one merge
for each token, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SPACE = "\u2581"
NEVER = -1e9  # the score of what no merge gives
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_DIFFERENCE = (
    "llama.cpp puts a space in front of every text, "
    "even of one that starts with a space or follows a special token"
)
_PREPEND = {"type": "Prepend", "prepend": SPACE}


@dataclass
class PieceRules:
    """Scores by token, whether a space is put in front, and what is not possible as (got, expected)."""

    scores: dict[str, float] = field(default_factory=dict)
    adds_space: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_byte(text: str) -> bool:
    """Whether a token stands for a byte: <0x0A>."""
    return _BYTE.fullmatch(text) is not None


def merge_pairs(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Merges as pairs: older files write them as one text with a space between."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def piece_rules(spec: Mapping[str, Any], *, forced: bool = False) -> PieceRules:
    """What llama.cpp needs of a tokenizer.json with byte fallback.

    `forced` takes it as it is where only spaces in front of a text are cut differently.
    """
    model, found = spec["model"], PieceRules()
    _spaces(spec, found, forced=forced)
    # Gemma has a tab in place of its byte: llama.cpp looks for that next
    lacking = [i for i in range(256) if not {f"<0x{i:02X}>", chr(i)[: i < 128]} & model["vocab"].keys()]
    if lacking:
        found.problems.append((f"byte fallback without {len(lacking)} of the 256 bytes", "all bytes"))
    order: list[str] = []
    pairs = set()
    for left, right in merge_pairs(model):
        pairs.add((left, right))
        if not order or order[-1] != left + right:
            order.append(left + right)
    found.scores = {text: -float(place) for place, text in enumerate(order)}
    if len(found.scores) < len(order):
        found.problems.append(("merges of one token that do not stand together", "SentencePiece's order"))
    # added tokens are found in the plain text, before anything is joined; with a space in them they are not
    apart = {token["content"] for token in spec["added_tokens"] if SPACE not in token["content"]}
    if lacking_pair := next(_unmerged(model["vocab"], pairs, apart), None):
        got = f"no merge of {lacking_pair[0]!r} and {lacking_pair[1]!r}, whose union is a token"
        found.problems.append((got, "a merge for each way to split a token, as SentencePiece has it"))
    return found


def _unmerged(
    vocab: Mapping[str, int], pairs: set[tuple[str, str]], apart: set[str]
) -> Iterator[tuple[str, str]]:
    """Pairs that llama.cpp would join and tokenizers would not."""
    for text in vocab:
        for cut in range(1, 0 if text in apart else len(text)):
            pair = (text[:cut], text[cut:])
            if pair not in pairs and pair[0] in vocab and pair[1] in vocab and not is_byte(text):
                yield pair


def _spaces(spec: Mapping[str, Any], found: PieceRules, *, forced: bool) -> None:
    """How spaces become pieces: replaced everywhere, and put in front of each text between special tokens."""
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer")
    parts = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    scheme = _metaspace(pre) if parts == [None] else None
    replaced = parts == [_REPLACE] and (pre is None or _changes_nothing(pre))
    found.adds_space = not replaced and scheme != "never"
    if replaced or scheme == "never" or (parts == [_PREPEND, _REPLACE] and pre is None):
        pass
    elif scheme is not None and forced:
        found.notes.append(f"{_DIFFERENCE}, as asked for by pre default")
    elif scheme is not None:
        got = f"a tokenizer that adds a space by Metaspace with prepend_scheme {scheme}"
        found.problems.append((got, f"one without; {_DIFFERENCE}: pre default takes that"))
    else:
        got = f"normalizer {normalizer} and pre-tokenizer {pre}"
        found.problems.append((got, "SentencePiece's handling of spaces"))
    if found.adds_space and (odd := [t["content"] for t in spec["added_tokens"] if t["normalized"]]):
        found.problems.append(
            (f"the added token {odd[0]!r} with normalized", "tokens found in the plain text")
        )


def _changes_nothing(pre: Mapping[str, Any]) -> bool:
    """Gemma splits at spaces that its normalizer has replaced."""
    return bool(pre["type"] == "Split" and pre["pattern"] == {"String": " "})


def _metaspace(pre: Mapping[str, Any] | None) -> str | None:
    """The prepend_scheme of a Metaspace that cuts nothing."""
    plain = pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True)
    return str(pre["prepend_scheme"]) if plain and pre else None
