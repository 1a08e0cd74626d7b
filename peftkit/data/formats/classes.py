"""Formats with classes: texts of one class or of several, and tagged words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peftkit.data.formats.base import BadRow, Example, as_boolean, loss_weight, reads, required_text
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
        raise BadRow(f"{name} is {value!r}", "one class for a text; data.format: multi-label takes any number")
    [value] = value if isinstance(value, list) else [value]
    return Example(row.where, prompt=text, label=_parse_class(value, name), weight=loss_weight(row.fields))


@reads("multi-label", ("text", "labels"), ("text", "label"))
def _multi_label(row: Row) -> Example:
    """Read a list of classes, or a 0 or 1 for each of three classes or more."""
    text = required_text(row.fields, "text")
    name = "labels" if "labels" in row.fields else "label"
    values = parse_list(row.fields.get(name), name)
    if not isinstance(values, list):
        raise BadRow(f"{name} is {values!r}", "a list of classes, which may be empty")
    classes = [_parse_class(value, name) for value in values]
    flags = [as_boolean(value) for value in values]
    if len(values) > 2 and None not in flags:
        classes = [str(number) for number, flag in enumerate(flags) if flag]
    if len(set(classes)) != len(classes):
        raise BadRow(f"{name} is {values!r}", "each class once, or a 0 or 1 for each of three classes or more")
    return Example(row.where, prompt=text, tags=tuple(classes), weight=loss_weight(row.fields))


def show_classes(names: Iterable[str]) -> str:
    """Return the classes of one text as it is shown: "a, b"."""
    return ", ".join(names) or "(none)"


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
