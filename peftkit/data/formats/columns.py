"""The recipe's `columns`: our names for the data's, and Jinja lines over whole rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peftkit.data.formats.base import BadRow
from peftkit.data.read import Row
from peftkit.errors import Problem, UserError
from peftkit.units import listed

Rename = Callable[[Row], Row]


def _line(text: str, where: str) -> Any:
    """A compiled Jinja line, in a sandbox: a recipe is data, not code."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from peftkit.data.chat.bounded import why_not_plain

    try:
        reason = why_not_plain(text)
        if reason and not reason.startswith("no Jinja"):
            got = f"{text[:200]!r}, which may take any time or memory ({reason})"
            raise UserError(Problem(where, got, "a line that only puts columns together"))
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=_as_text)
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(Problem(where, f"{text!r} ({error})", "a Jinja line")) from None


def _as_text(value: Any) -> Any:
    """What an expression of a line gives, as it is written: Python's way of writing lists is nobody's."""
    import jinja2

    if isinstance(value, str | int | float):
        return value
    if isinstance(value, jinja2.Undefined):
        return str(value)  # raises, with the name
    raise jinja2.TemplateRuntimeError(f"{'nothing' if value is None else type(value).__name__} in it")


def renamer(columns: Mapping[str, str], first: Row, where: str = "data.columns") -> Rename:
    """What brings a row's fields to our names. Raises UserError where the first row lacks a column."""
    if not columns:
        return lambda row: row
    lines = {
        ours: _line(theirs, where) for ours, theirs in columns.items() if "{{" in theirs or "{%" in theirs
    }
    plain = {ours: theirs for ours, theirs in columns.items() if ours not in lines}
    missing = [name for name in plain.values() if name not in first.fields]
    if missing:
        fix = f"found: {listed(list(first.fields))}"
        got = [f"{name!r}, which {first.where} lacks" for name in missing]
        raise UserError([Problem(where, text, "a column of the data", fix) for text in got])
    taken = set(plain.values())

    def rename(row: Row) -> Row:
        kept = {key: value for key, value in row.fields.items() if key not in taken}
        kept.update({ours: row.fields.get(theirs) for ours, theirs in plain.items()})
        kept.update({ours: _filled(line, row) for ours, line in lines.items()})
        return Row(kept, row.where)

    return rename


def _filled(line: Any, row: Row) -> str:
    import jinja2

    try:
        return str(line.render(row.fields))
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise BadRow(
            f"a row that the line of columns cannot fill ({error})", "its columns in the row"
        ) from None
