"""What the text of a row shows by itself, looked at while it is read: every row, before any tokenizer."""

from __future__ import annotations

import json
import re
from itertools import pairwise

from peftkit.data.formats.base import Example, Message
from peftkit.data.rows.tally import Tally
from peftkit.secrets import SHAPES

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u0080-\u009f\u200b\u2060\ufdd0-\ufdef\ufffe\uffff]")
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+")


def _said(turn: Message) -> str:
    """What one turn says: its reasoning and its calls as well."""
    if len(turn) == 2:  # the usual turn, at once
        return str(turn["content"])
    calls = turn.get("tool_calls")
    parts = (
        turn.get("reasoning_content"),
        turn["content"],
        json.dumps(calls, ensure_ascii=False) if calls else None,
    )
    return "\n".join(part for part in parts if part)


def text_of(example: Example) -> str:
    """Everything that a row says."""
    if example.messages:
        turns = () if isinstance(example.rejected, str) else example.rejected
        return "\n".join(map(_said, (*example.messages, *turns)))
    rejected = example.rejected if isinstance(example.rejected, str) else ""
    parts = (example.prompt, example.completion, rejected, " ".join(example.words))
    return "\n".join(part for part in parts if part)


def is_mojibake(text: str) -> bool:
    """Whether UTF-8 was read as a Windows or Latin code page on the way, so that 'é' became 'Ã©'."""
    for word in text.split():
        if word.isascii():
            continue
        raw = bytearray()
        for char in word:
            try:
                raw += char.encode("cp1252")
            except UnicodeEncodeError:
                if ord(char) > 0xFF:
                    break
                raw.append(ord(char))
        else:
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                continue
            return True
    return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def hidden(secret: str) -> str:
    """Enough of a secret to find it, never all of it."""
    return f"{secret[: min(6, len(secret) // 3)]}... ({len(secret)} characters)"


def has_secret(text: str) -> bool:
    """Whether a text holds what must not be shown: a key, a token, an e-mail address."""
    found = any(mark in text and pattern.search(text) for mark, _, pattern in SHAPES)
    return found or ("@" in text and _EMAIL.search(text) is not None)


def look(example: Example, tally: Tally) -> None:
    """Count what one row shows."""
    text = text_of(example)
    # the quick test first: a control character is not printable
    odd = None if text.replace("\n", "").isprintable() else _CONTROL.search(text)
    if odd:
        tally.add("control-characters", example.where, f"U+{ord(odd[0]):04X} at character {odd.start()}")
    if not text.isascii():
        if "\ufffd" in text or "\u00c3" in text or "\u00e2" in text or "\u00c2" in text:
            _mojibake(text, example.where, tally)
        elif is_mojibake(text):
            tally.add("mojibake", example.where, _short(text))
    for mark, name, pattern in SHAPES:
        if mark in text and (found := pattern.search(text)):
            tally.add("secrets", example.where, f"{name}: {hidden(found[0])}")
    if "@" in text and (found := _EMAIL.search(text)):
        tally.add("emails", example.where, hidden(found[0]))
    if example.messages:
        _roles(example, tally)
    if example.rejected:
        _preference(example, tally)


def _mojibake(text: str, where: str, tally: Tally) -> None:
    if "\ufffd" in text:
        place = text.index("\ufffd")
        around = text[max(0, place - 15) : place + 15]
        tally.add("mojibake", where, f"the replacement character in {_short(around)}")
    elif is_mojibake(text):
        word = next(w for w in text.split() if not w.isascii() and is_mojibake(w))
        tally.add("mojibake", where, _short(word))


def _roles(example: Example, tally: Tally) -> None:
    """Turns out of order, and answers that are empty."""
    turns = example.messages
    if len(turns) == 2 and turns[0]["role"] == "user":
        return
    for number, (before, after) in enumerate(pairwise(turns), start=2):
        one, other = before["role"], after["role"]
        if other == "system":
            tally.add("roles", example.where, f"turn {number} is a system turn")
            return
        if one == other and one in {"user", "assistant"}:
            tally.add("roles", example.where, f"turns {number - 1} and {number} are both {one}")
            return
        if other == "tool" and one not in {"assistant", "tool"}:
            tally.add("roles", example.where, f"turn {number} is a tool's after {one}")
            return
    for number, turn in enumerate(turns, start=1):
        given = number <= example.num_given
        if (
            turn["role"] == "assistant"
            and not given
            and not turn["content"].strip()
            and not turn.get("tool_calls")
        ):
            tally.add("empty-answers", example.where, f"turn {number} says nothing")
            return


def _preference(example: Example, tally: Tally) -> None:
    chosen = example.messages[-1]["content"] if example.messages else example.completion
    rejected = example.rejected if isinstance(example.rejected, str) else example.rejected[-1]["content"]
    if chosen.strip() == rejected.strip():
        tally.add("chosen-equals-rejected", example.where, _short(chosen))
    elif len(chosen) > len(rejected):
        tally.add("chosen-longer", example.where, f"{len(chosen)} against {len(rejected)} characters")
