"""Checks of a row's tokens and labels while it is tokenized: every row."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

from peftkit.data.formats.base import Example
from peftkit.data.rows.scan_text import text_of
from peftkit.data.rows.tally import Tally
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.objectives import OBJECTIVES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what other models' templates write: as text it teaches nothing but how to write it
_FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|eot_id|start_header_id|end_header_id|begin_of_text|endoftext|end|user|assistant|"
    r"system)\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|### (?:Instruction|Response|Assistant|Human):"
)


def span_end_tokens(row: Tokenized) -> list[int]:
    """Return the last token of every span that is in the loss."""
    num_masked = row.labels.count(IGNORE_INDEX)
    if num_masked < len(row.labels) and IGNORE_INDEX not in row.labels[num_masked:]:
        return [row.labels[-1]]  # the usual row: one answer, at its end
    next_labels = [*row.labels[1:], IGNORE_INDEX]
    return [a for a, b in zip(row.labels, next_labels, strict=True) if b == IGNORE_INDEX and a != IGNORE_INDEX]


def _without_blanks(text: str) -> str:
    """Return a text without what tokenizers may change: blanks, and how a character is composed (NFKC)."""
    return "".join(unicodedata.normalize("NFKC", text).split())


class TokenScanner:
    """The checks of texts and rows as they are tokenized; they count rows in `tally`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
        self.tally = Tally()
        self.task = task
        self._decode = tokenizer.decode
        self._bos, self._unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
        self._has_end = tokenizer.eos_token_id is not None
        self.special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
        special_texts = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 2}
        )
        self._special_pattern = re.compile("|".join(map(re.escape, special_texts))) if special_texts else None
        self._special_prefixes = tuple({text[:2] for text in special_texts})
        self.ends: Counter[int] = Counter()
        self.largest_id = 0

    def text(self, example: Example) -> None:
        """Count special tokens, or another template's markers, that are typed in a row's text."""
        text = text_of(example)
        if self._special_pattern is not None and any(mark in text for mark in self._special_prefixes):
            match = self._special_pattern.search(text)
            if match:
                self.tally.add("special-tokens", example.where, f"{match[0]} at character {match.start()}")
                return
        if "<" in text or "INST]" in text or "### " in text:
            match = _FOREIGN.search(text)
            if match:
                self.tally.add("foreign-markers", example.where, f"{match[0]} at character {match.start()}")

    def row(self, row: Tokenized, *, all_trained: bool) -> None:
        """Check a row before it is truncated; if it is `all_trained`, only its last token must be an end."""
        ids = row.input_ids
        self.largest_id = max(self.largest_id, max(ids, default=0))
        if self._unknown is not None and self._unknown in ids:
            self.tally.add("unknown-tokens", row.where, f"{ids.count(self._unknown)} of {len(ids)} tokens")
        if self._bos is not None and ids[:2] == [self._bos, self._bos]:
            self.tally.add("double-bos", row.where, "two start tokens")
        if not OBJECTIVES[self.task].generates_answers or (all_trained and not self._has_end):
            return  # nothing is generated, or raw text of a tokenizer without an end token
        ends = span_end_tokens(row)
        if all_trained:  # the last trained token, less the blanks that templates put after an end token
            labels = reversed(row.labels)
            end = next((t for t in labels if t == IGNORE_INDEX or self._decode([t]).strip()), IGNORE_INDEX)
            ends = [] if end == IGNORE_INDEX else [end]
        self.ends.update(ends[-1:])
        answer = next((n for n, token in enumerate(ends, start=1) if token not in self.special), None)
        if answer is not None:
            self.tally.add("end-token", row.where, f"answer {answer} does not end in an end token")

    def check_round_trip(self, row: Tokenized, text: str) -> None:
        """Check that a row's tokens decode to its text."""
        if self._unknown in row.input_ids:
            return  # told by a check of its own
        decoded, expected = _without_blanks(self._decode(row.input_ids)), _without_blanks(text)
        if expected not in decoded:
            position = next((i for i, (a, b) in enumerate(zip(decoded, expected, strict=False)) if a != b), 0)
            difference = f"{decoded[position : position + 20]!r} for {expected[position : position + 20]!r}"
            self.tally.add("round-trip", row.where, difference)

    def state(self) -> dict[str, Any]:
        """Return the full state, to resume from with `restore`."""
        return {**self.to_json(), "ends": [*self.ends.items()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.tally = Tally.from_json(state["tally"])
        self.ends = Counter(dict(state["ends"]))
        self.largest_id = state["largest_id"]

    def to_json(self) -> dict[str, Any]:
        """Return the tally, the eight most frequent end tokens and the largest id as plain JSON values."""
        return {
            "tally": self.tally.to_json(),
            "ends": [[token, count] for token, count in self.ends.most_common(8)],
            "largest_id": self.largest_id,
        }
