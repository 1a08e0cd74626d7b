"""What tokens and labels of a row show, looked at while it is tokenized: every row."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from peftkit.data.formats.base import Example
from peftkit.data.rows.scan_text import text_of
from peftkit.data.rows.tally import Tally
from peftkit.data.tokens.mask import IGNORED, Tokenized

# what other models' templates write: as text it teaches nothing but how to write it
_FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|eot_id|start_header_id|end_header_id|begin_of_text|endoftext|end|user|assistant|"
    r"system)\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|### (?:Instruction|Response|Assistant|Human):"
)


def ends_of(row: Tokenized) -> list[int]:
    """The last token of every stretch that is learnt."""
    num_masked = row.labels.count(IGNORED)
    if num_masked < len(row.labels) and IGNORED not in row.labels[num_masked:]:
        return [row.labels[-1]]  # the usual row: one answer, at its end
    following = [*row.labels[1:], IGNORED]
    return [a for a, b in zip(row.labels, following, strict=True) if b == IGNORED and a != IGNORED]


def _plain(text: str) -> str:
    """A text without what tokenizers may change: blanks, and how a character is composed."""
    return "".join(unicodedata.normalize("NFKC", text).split())


class Watch:
    """Looks at texts and rows as they pass, and counts what is odd in `tally`."""

    def __init__(self, tokenizer: Any, task: str) -> None:
        self.tally = Tally()
        self.task = task
        self._decode = tokenizer.decode
        self._bos, self._unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
        self.special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
        typed = sorted(
            {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 2}
        )
        self._typed = re.compile("|".join(map(re.escape, typed))) if typed else None
        self._typed_marks = tuple({text[:2] for text in typed})
        self.ends: Counter[int] = Counter()
        self.largest_id = 0

    def text(self, example: Example) -> None:
        """Special tokens that stand in what people wrote."""
        text = text_of(example)
        if self._typed is not None and any(mark in text for mark in self._typed_marks):
            found = self._typed.search(text)
            if found:
                self.tally.add("special-tokens", example.where, f"{found[0]} at character {found.start()}")
                return
        if "<" in text or "INST]" in text or "### " in text:
            found = _FOREIGN.search(text)
            if found:
                self.tally.add("foreign-markers", example.where, f"{found[0]} at character {found.start()}")

    def row(self, row: Tokenized, *, whole: bool) -> None:
        """A row before it is fitted to the length; where it is learnt `whole`, only its end has to end."""
        ids = row.input_ids
        self.largest_id = max(self.largest_id, max(ids, default=0))
        if self._unknown is not None and self._unknown in ids:
            self.tally.add("unknown-tokens", row.where, f"{ids.count(self._unknown)} of {len(ids)} tokens")
        if self._bos is not None and ids[:2] == [self._bos, self._bos]:
            self.tally.add("double-bos", row.where, "two start tokens")
        if self.task not in {"causal-lm", "seq2seq"}:
            return
        ends = self._end_of(row) if whole else ends_of(row)
        self.ends.update(ends[-1:])
        number = next((n for n, token in enumerate(ends, start=1) if token not in self.special), None)
        if number is not None:
            self.tally.add("end-token", row.where, f"answer {number} does not end in an end token")

    def _end_of(self, row: Tokenized) -> list[int]:
        """The last token learnt of a row, less the blanks that templates put after an end token."""
        end = next((t for t in reversed(row.labels) if t == IGNORED or self._decode([t]).strip()), IGNORED)
        return [] if end == IGNORED else [end]

    def round_trip(self, row: Tokenized, text: str) -> None:
        """Whether a row's tokens give back its text."""
        if self._unknown in row.input_ids:
            return  # told by a check of its own
        found, wanted = _plain(self._decode(row.input_ids)), _plain(text)
        if wanted not in found:
            place = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), 0)
            got = f"{found[place : place + 20]!r} for {wanted[place : place + 20]!r}"
            self.tally.add("round-trip", row.where, got)

    def state(self) -> dict[str, Any]:
        """All that was seen, to go on from."""
        return {**self.to_json(), "ends": [*self.ends.items()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.tally = Tally.from_json(state["tally"])
        self.ends = Counter(dict(state["ends"]))
        self.largest_id = state["largest_id"]

    def to_json(self) -> dict[str, Any]:
        """What was seen, as plain values."""
        return {
            "tally": self.tally.to_json(),
            "ends": [[token, count] for token, count in self.ends.most_common(8)],
            "largest_id": self.largest_id,
        }
