"""The recipe's `columns`: renamed columns, and Jinja templates over whole rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peftkit.data.formats.base import BadRow
from peftkit.data.jinja.render import render_line
from peftkit.data.read import Row
from peftkit.errors import Problem, UserError
from peftkit.units import join_names

RowRenamer = Callable[[Row], Row]


def make_renamer(columns: Mapping[str, str], first: Row, where: str = "data.columns") -> RowRenamer:
    """Return the function that renames a row's fields. Raises UserError if the first row lacks a column."""
    if not columns:
        return lambda row: row
    templates = {ours: theirs for ours, theirs in columns.items() if "{{" in theirs or "{%" in theirs}
    if templates:
        import jinja2

        environment = jinja2.Environment()
        for line in templates.values():
            try:
                tree = environment.parse(line)
            except jinja2.TemplateSyntaxError as error:
                raise UserError(Problem(where, f"{line!r} ({error})", "a Jinja template")) from None
            for kind, known in ((jinja2.nodes.Filter, environment.filters), (jinja2.nodes.Test, environment.tests)):
                if unknown := [node.name for node in tree.find_all(kind) if node.name not in known]:
                    fault = f"{line!r} (no {kind.__name__.lower()} {unknown[0]!r})"
                    raise UserError(Problem(where, fault, "a Jinja template"))
    renamed = {ours: theirs for ours, theirs in columns.items() if ours not in templates}
    missing = [name for name in renamed.values() if name not in first.fields]
    if missing:
        fix = f"found: {join_names(list(first.fields))}"
        got = [f"{name!r}, which {first.where} lacks" for name in missing]
        raise UserError([Problem(where, text, "a column of the data", fix) for text in got])
    source_columns = set(renamed.values())

    def rename(row: Row) -> Row:
        fields = {key: value for key, value in row.fields.items() if key not in source_columns}
        fields.update({field: row.fields.get(column) for field, column in renamed.items()})
        fields.update({field: _render(template, row) for field, template in templates.items()})
        return Row(fields, row.where)

    return rename


def columns_of_templates(columns: Mapping[str, str]) -> set[str]:
    """Return the columns that the templates of a recipe's `columns` read, by their names."""
    import jinja2.meta

    environment = jinja2.Environment()
    lines = [line for line in columns.values() if "{{" in line or "{%" in line]
    return {name for line in lines for name in jinja2.meta.find_undeclared_variables(environment.parse(line))}


def _render(line: str, row: Row) -> str:
    """Render a line with a row, in the sandbox. Raises BadRow for a row that it refuses."""
    import jinja2

    try:
        return render_line(line, row.fields)
    except jinja2.TemplateError as error:
        got = f"a row that the template in columns cannot render ({error})"
        raise BadRow(got, "a row with the columns that the template uses") from None
