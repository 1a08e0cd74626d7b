"""Advice for columns that no format has: a map of them that reads the row, tried before it is given."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import yaml

from peftkit.data.formats.base import READERS, BadRow, as_boolean
from peftkit.data.read import Row

# what people call the columns of a format, likeliest first
_SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "classification": {
        "text": "text sentence review comment tweet message utterance title headline content body document input query",
        "label": "label sentiment class category intent topic label_text label_name tag emotion toxic stars",
    },
    "instruction": {
        "instruction": "instruction instructions task",
        "output": "output response answer completion target solution reply",
    },
    "question-answer": {"question": "question questions", "answer": "answer answers response output reply solution"},
    "prompt-completion": {
        "prompt": "prompt question instruction query input source problem user human request user_message "
        "source_text text",
        "completion": "completion response answer output reply solution assistant target summary answers target_text "
        "translation gpt bot bot_reply assistant_message assistant_reply",
    },
    "text": {"text": "text content body document article story code passage paragraph markdown raw_content sentence"},
}


_NO_TEXT = re.compile(
    r"(.*_)?(id|uuid|url|uri|date|time|hash|source|title|name|lang|language|split|chosen.*|rejected.*"
    r"|(bad|worse|worst|negative|wrong|incorrect|dispreferred)(_.*)?)$"
)


def advise_columns(row: Row, format_name: str, given: Mapping[str, str] | None = None) -> str:
    """Return the `columns` that let a row be read, as a recipe has them; empty where none was found that does.

    `format_name` is a format to read it as, or auto; `given` are the recipe's own columns, by which the row has
    been renamed: they are kept where they are read.
    """
    given = given or {}
    for columns, reader in _candidates(row, format_name):
        if any("{{" in column or "{%" in column for column in columns.values()):
            continue  # it would be taken for a template
        renamed = {key: value for key, value in row.fields.items() if key not in columns.values()}
        renamed |= {ours: row.fields[theirs] for ours, theirs in columns.items()}
        try:
            READERS[reader].read(Row(renamed, row.where))
        except BadRow:
            continue
        kept = {ours: theirs for ours, theirs in given.items() if ours not in columns.values()}
        whole = {**kept, **{ours: given.get(theirs, theirs) for ours, theirs in columns.items()}}
        mapping = {ours: theirs for ours, theirs in whole.items() if ours != theirs}
        text = yaml.safe_dump(mapping, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
        if yaml.safe_load(text) == mapping:
            return f"columns: {text.strip()}"
    return ""


def _candidates(row: Row, format_name: str) -> Iterator[tuple[dict[str, str], str]]:
    """Yield (our column -> theirs, format): by their names, then texts in their order."""
    for turns, value in row.fields.items():
        if format_name in {"auto", "chat"} and isinstance(value, list):
            yield {"messages": turns}, "chat"
    by_key = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in row.fields}
    formats = [format_name] if format_name != "auto" else list(_SYNONYMS)
    for name in formats:
        columns: dict[str, str] = {}
        for ours, synonyms in _SYNONYMS.get(name, {}).items():
            known = (by_key[word] for word in synonyms.split() if word in by_key)
            if (theirs := next((column for column in known if column not in columns.values()), None)) is not None:
                columns[ours] = theirs
        rates = name == "classification" and as_boolean(row.fields.get(columns.get("label", ""))) is not None
        if rates and by_key.keys() & set(_SYNONYMS["prompt-completion"]["completion"].split()):
            continue  # an answer, and whether it is a good one
        if columns and len(columns) == len(_SYNONYMS[name]):
            yield columns, name
    texts = [name for name, value in row.fields.items() if isinstance(value, str) and value.strip()]
    # what is left is a guess: only where nothing else can be meant
    if by_key.keys() & set(_SYNONYMS["classification"]["label"].split()) or any(map(_NO_TEXT.match, by_key)):
        return
    if len(texts) == 2 and "prompt-completion" in formats:
        yield {"prompt": texts[0], "completion": texts[1]}, "prompt-completion"
    if len(texts) == 1 and "text" in formats:
        yield {"text": texts[0]}, "text"
