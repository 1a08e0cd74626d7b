"""Columns and keys of turns that no reader reads, and what they look like: turns, media, masks or labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from peftkit.data.formats.base import BadRow
from peftkit.data.formats.chat import TURN_COLUMNS, TURN_KEYS, parse_list
from peftkit.data.read import Row

_EMPTY: tuple[object, ...] = (None, "", [], {}, ())
_MEDIA = re.compile(r"(image|video|audio|picture|photo|pixel_value|speech|img|wav|mp3)s?(_(path|url|file|byte)s?)?$")
_NAMES = {
    "turns": r"(chat_?)?(history|turns?|messages?|conversations?|dialogu?e?s?)|system(_prompt)?|context|input|tools",
    "a mask": r"(loss|train|label|assistant|completion)_?(mask|weights?|scale)s?|masks?|weights?|train(able|ing)?|loss",
    "labels": r"labels?|score|rating|reward|rank|chosen|rejected\w*|preferences?|feedback|kto_tag|is_\w+|accepted",
    "reasoning": r"reasoning\w*|thinking|thoughts?|cot|rationale",
}


def unused_values(row: Row, used: frozenset[str]) -> Iterator[tuple[str, object]]:
    """Yield (column, value) for what a row says and no reader reads; a turn's key as "messages[].key".

    Raises BadRow for media: a text that refers to a picture says nothing without it; and for turns as text that
    is no JSON.
    """
    for name in row.fields.keys() - used:
        value = row.fields[name]
        if value in _EMPTY:
            continue
        if _MEDIA.match(name.lower()):
            raise BadRow(f"media in {name}", "text only", check="media")
        yield name, value
    for name in row.fields.keys() & used:
        turns = parse_list(row.fields[name], name) if name in TURN_COLUMNS else row.fields[name]
        if isinstance(turns, list):
            for turn in turns:
                if not isinstance(turn, Mapping) or len(turn) <= 2:
                    continue
                for key in turn.keys() - TURN_KEYS:
                    if turn[key] in _EMPTY:
                        continue
                    if _MEDIA.match(str(key).lower()):
                        raise BadRow(f"media in {name}[].{key}", "text only", check="media")
                    yield f"{name}[].{key}", turn[key]


def resembles(name: str, value: object) -> str:
    """Return what an unused column looks like, by its name or its value; empty for anything else."""
    key = name.rpartition(".")[2].lower()
    if isinstance(value, bool):
        return "labels"
    if isinstance(value, list) and value:
        if all(isinstance(item, Mapping) and {"role", "from", "content", "value"} & item.keys() for item in value):
            return "turns"
        if all(isinstance(item, list) and len(item) == 2 for item in value):
            return "turns"
        if all(isinstance(item, int) and item in {0, 1} for item in value):
            return "a mask"
    return next((kind for kind, pattern in _NAMES.items() if re.fullmatch(pattern, key)), "")
