"""Tables on stdout, and what they are made of."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftkit.units import show_count, show_percent


def console_of(width: int = 180) -> Console:
    """Return a console as wide as the terminal, or of `width` columns where there is none."""
    console = StdoutConsole()
    return console if console.is_terminal else StdoutConsole(width=width, file=cast(IO[str], _TrimmedStdout()))


class StdoutConsole(Console):
    """A console that breaks no short first column, and no pipe without an error: rich would exit with 1."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; a table's first column, its keys, is whole where that leaves half of the width."""
        for table in objects:
            if isinstance(table, Table) and table.columns:
                longest = max((len(str(cell)) for cell in table.columns[0].cells), default=0)
                table.columns[0].no_wrap = longest <= self.width // 2
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _TrimmedStdout:
    """Stdout without the blanks by which tables fill their lines."""

    def write(self, text: str) -> int:
        sys.stdout.write(re.sub(r"[ \t]+(?=\n)", "", text))
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()


def escape_cells(cells: Iterable[str]) -> list[str]:
    """Escape square brackets, which rich would take for markup."""
    return [escape(cell) for cell in cells]


def new_table(*headings: str) -> Table:
    """Return an empty table with these headings."""
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def print_rows(rows: Iterable[Sequence[str]], *, headed: bool = False) -> None:
    """Print rows of texts in columns; with `headed` the first is a heading."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for number, row in enumerate(rows):
        table.add_row(*escape_cells(row), style="bold" if headed and number == 0 else None)
    console_of().print(table, highlight=False)


def parameters_table(by_role: Mapping[str, int], num_trainable: int, num_total: int) -> Table:
    """Return the table of trainable parameters by role."""
    table = new_table("trainable", "parameters")
    table.columns[1].justify = "right"
    for role, count in by_role.items():
        table.add_row(role, show_count(count))
    share = show_percent(num_trainable / max(1, num_total))
    table.add_row("total", f"{show_count(num_trainable)} of {show_count(num_total)} ({share})")
    return table
