"""Formats with classes: classified texts and tagged words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peftkit.data.formats.base import BadRow, Example, loss_weight, reads, required_text
from peftkit.data.formats.chat import parse_list
from peftkit.data.read import Row


def _parse_class(value: object, name: str) -> str:
    """Return a class as text: a text, a truth value, or a whole number (also pandas' 1.0). Raises BadRow."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    empty = value is None or (isinstance(value, str) and not value.strip())
    if empty or not isinstance(value, str | int):
        check = "empty-answers" if empty else "missing-fields"
        raise BadRow(f"{name} is {value!r}", f"a class in {name}, as text or a whole number", check=check)
    return str(value)


@reads("classification", ("text", "label"), ("text", "labels"))
def _classification(row: Row) -> Example:
    text = required_text(row.fields, "text")
    name = "label" if "label" in row.fields else "labels"
    value = row.fields.get(name)
    if isinstance(value, list) and len(value) != 1:
        way = f"columns: {{prompt: text, completion: \"{{{{ {name} | join(', ') }}}}\"}} lets a decoder write several"
        raise BadRow(f"{name} is {value!r}", f"one class for a text; {way}")
    [value] = value if isinstance(value, list) else [value]
    return Example(row.where, prompt=text, label=_parse_class(value, name), weight=loss_weight(row.fields))


@reads("token-classification", ("tokens", "tags"), ("tokens", "ner_tags"))
def _token_classification(row: Row) -> Example:
    name = "tags" if "tags" in row.fields else "ner_tags"
    words, tags = (parse_list(row.fields.get(key), key) for key in ("tokens", name))
    if not isinstance(words, list) or not isinstance(tags, list) or not words:
        raise BadRow(f"tokens and {name} that are not lists", f"a list of words and a list of {name}")
    if len(words) != len(tags):
        raise BadRow(f"{len(words)} tokens with {len(tags)} {name}", "one tag for each token")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise BadRow("a token that is empty or not text", "words as text")
    return Example(
        row.where,
        words=tuple(words),
        tags=tuple(_parse_class(tag, name) for tag in tags),
        weight=loss_weight(row.fields),
    )


def sorted_labels(classes: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct classes in order: numbers by value, text by alphabet."""
    labels = set(classes)
    if labels and all(re.fullmatch(r"-?\d+", label, re.ASCII) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))
