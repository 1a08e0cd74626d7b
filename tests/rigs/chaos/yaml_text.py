"""Values as YAML 1.2 text in many styles, written by no YAML library: a second opinion on the reader."""

from __future__ import annotations

import json
import random
import re
from typing import Any

_PLAIN = re.compile(r"[A-Za-z/.][A-Za-z0-9_./-]*(?: [A-Za-z0-9_./-]+)*")
_NOT_TEXT = re.compile(r"(?i)~|null|true|false|\.inf|\.nan|[-+.0-9][0-9a-fox_.eE+-]*")


def scalar(rng: random.Random, value: Any, *, key: bool = False) -> str:
    """A value in one of the forms that YAML 1.2's core schema has for it."""
    match value:
        case None:
            return rng.choice(["null", "~", "Null", "NULL"])
        case bool():
            text = str(value)
            return rng.choice([text, text.lower(), text.upper()])
        case int():
            forms = [str(value)] * 4
            if value >= 0:
                forms += [f"+{value}", f"0{value}", f"0x{value:x}", f"0o{value:o}"]
            return rng.choice(forms)
        case float():
            return rng.choice([repr(value), f"{value:.17e}", f"{value:.17E}"])
    return _text(rng, value, key=key)


def _text(rng: random.Random, value: str, *, key: bool) -> str:
    plain = _PLAIN.fullmatch(value) and not _NOT_TEXT.fullmatch(value)
    if plain and (key or rng.random() < 0.6):
        return value
    simple = value.isprintable() and value == value.strip()
    if simple and rng.random() < 0.5:
        return "'" + value.replace("'", "''") + "'"
    if any(ord(letter) > 0xFFFF for letter in value):  # JSON writes them as two halves, which YAML has not
        return "".join(f"\\U{ord(letter):08X}" for letter in value).join('""')
    return json.dumps(value, ensure_ascii=not value.isprintable() or rng.random() < 0.5)


def flow(rng: random.Random, value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        inner = (f"{scalar(rng, name, key=True)}: {flow(rng, item)}" for name, item in value.items())
        return "{" + ", ".join(inner) + rng.choice(["", " "]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(flow(rng, item) for item in value) + rng.choice(["", ","] if value else [""]) + "]"
    return scalar(rng, value)


def block(rng: random.Random, value: dict[str, Any], indent: int = 0) -> str:
    """A mapping line by line, with comments and blank lines between."""
    lines = []
    step = rng.choice([1, 2, 4])
    for name, item in value.items():
        if rng.random() < 0.1:
            lines.append(
                rng.choice(["", "# a comment: [with, signs] & *more !x"])
            )  # at the left: deeper, it would be a line of the text above
        head = " " * indent + scalar(rng, name, key=True) + ":"
        if isinstance(item, dict) and item and rng.random() < 0.8:
            lines += [head + rng.choice(["", "  # why"]), block(rng, item, indent + step).rstrip("\n")]
        elif isinstance(item, list) and item and rng.random() < 0.6:
            lines += [head, *(" " * (indent + step) + "- " + flow(rng, each) for each in item)]
        elif isinstance(item, str) and _literal(item) and rng.random() < 0.3:
            lines += [f"{head} |-", *(" " * (indent + step) + line for line in item.split("\n"))]
        else:
            lines.append(f"{head} {flow(rng, item)}" + rng.choice(["", "", "   # why"]))
    return "\n".join(lines) + "\n"


def _literal(text: str) -> bool:
    lines = text.split("\n")
    return all(line.isprintable() and line.strip() == line and line for line in lines)


def document(rng: random.Random, value: dict[str, Any]) -> bytes:
    """A whole file: any style, line ends, a mark in front or none."""
    text = flow(rng, value) + "\n" if rng.random() < 0.2 else block(rng, value)
    if rng.random() < 0.1:
        text = "---\n" + text + rng.choice(["", "...\n"])
    if rng.random() < 0.15:
        text = text.replace("\n", rng.choice(["\r\n", "\r"]))
    if rng.random() < 0.1:
        text = text.rstrip("\r\n")
    mark = b"\xef\xbb\xbf" if rng.random() < 0.1 else b""
    return mark + text.encode()
