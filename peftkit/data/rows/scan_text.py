"""Checks of a row's text while it is read: every row, before any tokenizer."""

from __future__ import annotations

import json
import re
from itertools import pairwise

from peftkit.data.formats.base import Example, Message
from peftkit.data.rows.tally import Tally
from peftkit.secrets import SHAPES

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u0080-\u009f\u200b\u2060\ufdd0-\ufdef\ufffe\uffff]")
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+")


def _turn_text(turn: Message) -> str:
    """Return the text of one turn, with its reasoning and its tool calls."""
    if len(turn) == 2:  # the usual turn, at once
        return str(turn["content"])
    calls = turn.get("tool_calls")
    parts = (turn.get("reasoning_content"), turn["content"], json.dumps(calls, ensure_ascii=False) if calls else None)
    return "\n".join(part for part in parts if part)


def text_of(example: Example) -> str:
    """Return all text of an example."""
    if example.messages:
        turns = () if isinstance(example.rejected, str) else example.rejected
        return "\n".join(map(_turn_text, (*example.messages, *turns)))
    rejected = example.rejected if isinstance(example.rejected, str) else ""
    parts = (example.prompt, example.completion, rejected, " ".join(example.words))
    return "\n".join(part for part in parts if part)


def is_mojibake(text: str) -> bool:
    """Return whether UTF-8 text was decoded as a Windows or Latin code page, so that 'é' became 'Ã©'.

    True if a word that is not ASCII, encoded back as cp1252 (or Latin-1), is valid UTF-8.
    """
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


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def redacted_secret(secret: str) -> str:
    """Return the start of a secret and its length: enough to find it, never all of it."""
    return f"{secret[: min(6, len(secret) // 3)]}... ({len(secret)} characters)"


def has_secret(text: str) -> bool:
    """Return whether a text holds what must not be shown: a key, a token, an e-mail address."""
    has_key = any(mark in text and pattern.search(text) for mark, _, pattern in SHAPES)
    return has_key or ("@" in text and _EMAIL.search(text) is not None)


def scan_text(example: Example, tally: Tally) -> None:
    """Count in `tally` what one row's text shows: odd characters, mojibake, secrets, roles, preferences."""
    text = text_of(example)
    # the quick test first: a control character is not printable
    control = None if text.replace("\n", "").isprintable() else _CONTROL.search(text)
    if control:
        tally.add("control-characters", example.where, f"U+{ord(control[0]):04X} at character {control.start()}")
    if not text.isascii():
        if "\ufffd" in text or "\u00c3" in text or "\u00e2" in text or "\u00c2" in text:
            if "\ufffd" in text:
                position = text.index("\ufffd")
                around = text[max(0, position - 15) : position + 15]
                tally.add("mojibake", example.where, f"the replacement character in {_quoted(around)}")
            elif is_mojibake(text):
                word = next(w for w in text.split() if not w.isascii() and is_mojibake(w))
                tally.add("mojibake", example.where, _quoted(word))
        elif is_mojibake(text):
            tally.add("mojibake", example.where, _quoted(text))
    for mark, name, pattern in SHAPES:
        if mark in text and (match := pattern.search(text)):
            tally.add("secrets", example.where, f"{name}: {redacted_secret(match[0])}")
    if "@" in text and (match := _EMAIL.search(text)):
        tally.add("emails", example.where, redacted_secret(match[0]))
    if example.messages:
        _check_roles(example, tally)
    if example.rejected:
        chosen = example.messages[-1]["content"] if example.messages else example.completion
        rejected = example.rejected if isinstance(example.rejected, str) else example.rejected[-1]["content"]
        if chosen.strip() == rejected.strip():
            tally.add("chosen-equals-rejected", example.where, _quoted(chosen))
        elif len(chosen) > len(rejected):
            tally.add("chosen-longer", example.where, f"{len(chosen)} against {len(rejected)} characters")


def _check_roles(example: Example, tally: Tally) -> None:
    """Count a chat whose turns are out of order, or that has an empty answer."""
    turns = example.messages
    if len(turns) == 2 and turns[0]["role"] == "user":
        return
    for number, (before, after) in enumerate(pairwise(turns), start=2):
        role, next_role = before["role"], after["role"]
        if next_role == "system":
            tally.add("roles", example.where, f"turn {number} is a system turn")
            return
        if role == next_role and role in {"user", "assistant"}:
            tally.add("roles", example.where, f"turns {number - 1} and {number} are both {role}")
            return
        if next_role == "tool" and role not in {"assistant", "tool"}:
            tally.add("roles", example.where, f"turn {number} is a tool turn after {role}")
            return
    for number, turn in enumerate(turns, start=1):
        is_prompt = number <= example.num_given
        if turn["role"] == "assistant" and not is_prompt and not turn["content"].strip() and not turn.get("tool_calls"):
            tally.add("empty-answers", example.where, f"turn {number} is empty")
            return
