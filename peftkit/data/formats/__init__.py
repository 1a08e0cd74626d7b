"""The formats of training data: one function each turns a row into an `Example`, under `@reads`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from peftkit.data.formats import chat, classes, pairs  # noqa: F401  each registers its readers
from peftkit.data.formats.advice import advise_columns
from peftkit.data.formats.base import READERS, BadRow, Example, Format, Message, as_boolean
from peftkit.data.formats.classes import sorted_labels
from peftkit.data.formats.columns import make_renamer
from peftkit.data.read import MAX_PROBLEMS, Row
from peftkit.errors import Problem, UserError
from peftkit.units import join_names

__all__ = [
    "CLASSES",
    "FORMATS",
    "PREFERENCES",
    "BadRow",
    "Example",
    "Format",
    "Message",
    "detect_format",
    "labels_of",
    "rename",
    "select_reader",
    "to_examples",
]
# the order matters: the first whose columns are all there is taken
_ORDER = (
    *("preference", "unpaired-preference", "chat", "prompt-completion", "instruction", "question-answer", "seq2seq"),
    *("token-classification", "multi-label", "classification", "text"),
)
assert set(_ORDER) == READERS.keys(), "a format without a place in the order"
FORMATS: dict[str, Format] = {name: READERS[name] for name in _ORDER}
CLASSES = frozenset({"token-classification", "multi-label", "classification"})
PREFERENCES = frozenset({"preference", "unpaired-preference"})
_MAX_COLUMNS_SHOWN = 20  # columns that a message names


def _columns_problem(row: Row, format_name: str, expected: str, given: Mapping[str, str] | None, of: str) -> UserError:
    advice = advise_columns(row, format_name, given)
    fix = f"set {of}{advice}" if advice else f"map your columns with {of}columns, or name another {of}format"
    got = f"the columns {join_names(list(row.fields), _MAX_COLUMNS_SHOWN)}"
    return UserError(Problem(row.where, got, expected, fix))


def detect_format(rows: Sequence[Row], given: Mapping[str, str] | None = None, of: str = "data.") -> str:
    """Return the first format whose columns the row has. Raises UserError with the columns of each format."""
    names = list(rows[0].fields)
    # a label that is neither true nor false is a column of its own: a class, a topic
    is_rated = any(as_boolean(rows[0].fields.get(name)) is not None for name in ("label", "kto_tag"))
    value = rows[0].fields.get("labels", rows[0].fields.get("label"))
    meant = {"unpaired-preference": is_rated, "multi-label": isinstance(value, list) and len(value) != 1}
    for name, spec in FORMATS.items():
        if any(set(columns) <= set(names) for columns in spec.columns) and meant.get(name, True):
            return name
    wanted = (f"{name}: {' or '.join(' + '.join(c) for c in spec.columns)}" for name, spec in FORMATS.items())
    raise _columns_problem(rows[0], "auto", f"the columns of a format ({'; '.join(wanted)})", given, of)


def select_reader(
    first_row: Row, format_name: str, given: Mapping[str, str] | None = None, of: str = "data."
) -> tuple[str, Callable[[Row], Example]]:
    """Return (name, reading function) of a format; `auto` detects it from the first row.

    Raises UserError if the first row lacks the format's columns, with columns that would do, where some were
    found: `given` are the recipe's own, and `of` says of what in the recipe.
    """
    name = detect_format([first_row], given, of) if format_name == "auto" else format_name
    spec = FORMATS[name]
    if not any(set(columns) <= set(first_row.fields) for columns in spec.columns):
        expected = " or ".join(" + ".join(columns) for columns in spec.columns)
        raise _columns_problem(first_row, name, f"the columns of {name}: {expected}", given, of)
    return name, spec.read


def rename(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Row]:
    """Return the rows with the recipe's `columns` applied. Raises UserError for absent columns."""
    return [*map(make_renamer(columns, rows[0]), rows)] if columns else list(rows)


def labels_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """Return the classes that occur, sorted; empty without classes."""
    labels: set[str] = set()
    for example in examples:
        labels.update(example.tags)
        if example.label:
            labels.add(example.label)
    return sorted_labels(labels)


def to_examples(rows: Sequence[Row], name: str) -> list[Example]:
    """Return rows as examples of a format. Raises UserError with file and line of every bad row."""
    _, read_row = select_reader(rows[0], name)
    examples, problems = [], []
    for row in rows:
        try:
            examples.append(read_row(row))
        except BadRow as bad:
            problems.append(Problem(row.where, bad.got, bad.expected))
    if problems:
        num_more = len(problems) - MAX_PROBLEMS
        rest = [Problem("data", f"{num_more} more rows that do not fit", f"the format {name}")] if num_more > 0 else []
        raise UserError([*problems[:MAX_PROBLEMS], *rest])
    return examples
