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
UNREACHABLE_SCORE = -1e9  # the score of what no merge gives
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_SPACE_DIFFERENCE = (
    "llama.cpp puts a space in front of every text, even of one that starts with a space or follows a special token"
)
_PREPEND = {"type": "Prepend", "prepend": SPACE}


@dataclass
class PieceRules:
    """SentencePiece rules for llama.cpp: scores by token, the leading space, and problems (got, expected)."""

    scores: dict[str, float] = field(default_factory=dict)
    adds_space: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_byte_token(text: str) -> bool:
    """Return whether a token stands for a byte: <0x0A>."""
    return _BYTE.fullmatch(text) is not None


def merge_pairs(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield merges as pairs: older files write them as one text with a space between."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def read_piece_rules(spec: Mapping[str, Any], *, forced: bool = False) -> PieceRules:
    """Read what llama.cpp needs from a tokenizer.json with byte fallback.

    `forced` accepts a tokenizer where only spaces at the start of a text are cut differently.
    """
    model, rules = spec["model"], PieceRules()
    _check_spaces(spec, rules, forced=forced)
    # Gemma has a tab in place of its byte: llama.cpp looks for that next
    missing_bytes = [i for i in range(256) if not {f"<0x{i:02X}>", chr(i)[: i < 128]} & model["vocab"].keys()]
    if missing_bytes:
        rules.problems.append((f"byte fallback without {len(missing_bytes)} of the 256 bytes", "all bytes"))
    order: list[str] = []
    pairs = set()
    for left, right in merge_pairs(model):
        pairs.add((left, right))
        if not order or order[-1] != left + right:
            order.append(left + right)
    rules.scores = {text: -float(rank) for rank, text in enumerate(order)}
    if len(rules.scores) < len(order):
        rules.problems.append(("merges of one token that are not adjacent", "SentencePiece's order"))
    # added tokens are found in the plain text, before anything is joined; with a space in them they are not
    added_tokens = {token["content"] for token in spec["added_tokens"] if SPACE not in token["content"]}
    if missing_pair := next(_missing_merges(model["vocab"], pairs, added_tokens), None):
        got = f"no merge of {missing_pair[0]!r} and {missing_pair[1]!r}, whose union is a token"
        rules.problems.append((got, "a merge for each way to split a token, as SentencePiece has it"))
    return rules


def _missing_merges(
    vocab: Mapping[str, int], pairs: set[tuple[str, str]], added_tokens: set[str]
) -> Iterator[tuple[str, str]]:
    """Yield pairs that llama.cpp would join and tokenizers would not."""
    for text in vocab:
        for split in range(1, 0 if text in added_tokens else len(text)):
            pair = (text[:split], text[split:])
            if pair not in pairs and pair[0] in vocab and pair[1] in vocab and not is_byte_token(text):
                yield pair


def _check_spaces(spec: Mapping[str, Any], rules: PieceRules, *, forced: bool) -> None:
    """Check how spaces become pieces: replaced everywhere, and put before each text between specials."""
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer")
    parts = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    scheme = None
    if parts == [None] and pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True):
        scheme = str(pre["prepend_scheme"])
    # Gemma splits at spaces that its normalizer has replaced: it splits nothing
    splits_nothing = pre is None or bool(pre["type"] == "Split" and pre["pattern"] == {"String": " "})
    spaces_replaced = parts == [_REPLACE] and splits_nothing
    rules.adds_space = not spaces_replaced and scheme != "never"
    if spaces_replaced or scheme == "never" or (parts == [_PREPEND, _REPLACE] and pre is None):
        pass
    elif scheme is not None and forced:
        rules.notes.append(f"{_SPACE_DIFFERENCE}, as requested by --pre default")
    elif scheme is not None:
        got = f"a tokenizer that adds a space by Metaspace with prepend_scheme {scheme}"
        rules.problems.append((got, f"one without; {_SPACE_DIFFERENCE}: --pre default accepts that"))
    else:
        got = f"normalizer {normalizer} and pre-tokenizer {pre}"
        rules.problems.append((got, "SentencePiece's handling of spaces"))
    if rules.adds_space and (normalized_tokens := [t["content"] for t in spec["added_tokens"] if t["normalized"]]):
        rules.problems.append(
            (f"the added token {normalized_tokens[0]!r} with normalized", "tokens found in the plain text")
        )
