"""Formats of training data: one function each turns a row into an `Example`; a new one is a table's row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from peftkit.data.formats import chat, classes, pairs
from peftkit.data.formats.base import BadRow, Example, Format, Message
from peftkit.data.formats.classes import sorted_labels
from peftkit.data.formats.columns import renamer
from peftkit.data.read import MAX_PROBLEMS, Row
from peftkit.errors import Problem, UserError, nearest
from peftkit.units import clipped, listed

__all__ = [
    "CLASSES",
    "FORMATS",
    "BadRow",
    "Example",
    "Format",
    "Message",
    "detect",
    "labels_of",
    "reader",
    "rename",
    "to_examples",
]
# the order matters: the first whose columns are all there is taken
FORMATS: dict[str, Format] = {**chat.FORMATS, **pairs.FORMATS, **classes.FORMATS, **pairs.TEXT}
CLASSES = frozenset(classes.FORMATS)
_SHOWN = 20  # columns that a message names


def _wants() -> str:
    return "; ".join(
        f"{name}: {' or '.join(' + '.join(c) for c in spec.columns)}" for name, spec in FORMATS.items()
    )


def _columns_problem(where: str, found: Sequence[str], expected: str) -> UserError:
    words = [name for spec in FORMATS.values() for columns in spec.columns for name in columns]
    near = {column: nearest(column, words) for column in found[:_SHOWN] if column not in words}
    hints = [f"{clipped(column)} looks like {close[0]}" for column, close in near.items() if close]
    fix = f"map your columns, for example columns: {{prompt: {clipped(found[0]) if found else 'question'}}}"
    return UserError(
        Problem(where, f"the columns {listed(found, _SHOWN)}", expected, "; ".join([*hints, fix]))
    )


def detect(rows: Sequence[Row]) -> str:
    """The format that the first row's columns name. Raises UserError listing what each format wants."""
    found = list(rows[0].fields)
    for name, spec in FORMATS.items():
        if any(set(columns) <= set(found) for columns in spec.columns):
            return name
    raise _columns_problem(rows[0].where, found, f"the columns of a format ({_wants()})")


def reader(first: Row, wanted: str) -> tuple[str, Callable[[Row], Example]]:
    """(name, reading function) of the format wanted, or detected where that is auto.

    Raises UserError where the first row has not its columns.
    """
    name = detect([first]) if wanted == "auto" else wanted
    spec = FORMATS[name]
    if not any(set(columns) <= set(first.fields) for columns in spec.columns):
        expected = " or ".join(" + ".join(columns) for columns in spec.columns)
        raise _columns_problem(first.where, list(first.fields), f"the columns of {name}: {expected}")
    return name, spec.read


def rename(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Row]:
    """Rows with the recipe's `columns` applied. Raises UserError for absent columns."""
    return [*map(renamer(columns, rows[0]), rows)] if columns else list(rows)


def labels_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """The classes that occur, sorted; empty without classes."""
    found: set[str] = set()
    for example in examples:
        found.update(example.tags)
        if example.label:
            found.add(example.label)
    return sorted_labels(found)


def to_examples(rows: Sequence[Row], name: str) -> list[Example]:
    """Rows as examples of a format. Raises UserError with file and line of every row that does not fit."""
    _, read = reader(rows[0], name)
    examples, problems = [], []
    for row in rows:
        try:
            examples.append(read(row))
        except BadRow as bad:
            problems.append(Problem(row.where, bad.got, bad.expected))
    if problems:
        more = len(problems) - MAX_PROBLEMS
        extra = (
            [Problem("data", f"{more} more rows that do not fit", f"the format {name}")] if more > 0 else []
        )
        raise UserError([*problems[:MAX_PROBLEMS], *extra])
    return examples
