"""Tables on stdout: the plan's decisions and a run's summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftkit.api import Evaluation, Inspection
from peftkit.plan import Plan
from peftkit.report import Summary
from peftkit.units import show_count, show_percent


def _console(width: int = 180) -> Console:
    """As wide as the terminal; wide enough for whole rows where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def _plain(cells: Iterable[str]) -> list[str]:
    """Texts with square brackets as they are: rich would take them for markup."""
    return [escape(cell) for cell in cells]


def _table(*headings: str) -> Table:
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def print_plan(plan: Plan) -> None:
    """Every decided value, where it came from and why."""
    console = _console()
    table = _table("key", "value", "from", "because")
    for decision in sorted(plan.decisions, key=lambda d: d.key):
        value = (
            ", ".join(map(str, decision.value)) if isinstance(decision.value, list) else str(decision.value)
        )
        table.add_row(*_plain((decision.key, value, decision.source, decision.reason)))
    console.print(table)
    method = plan.method
    if method.trainable_by_role and method.num_trainable and method.num_parameters:
        added = method.num_trainable if method.peft else 0
        console.print()
        console.print(
            _parameters(method.trainable_by_role, method.num_trainable, method.num_parameters + added)
        )


def _parameters(by_role: Mapping[str, int], num_trainable: int, num_total: int) -> Table:
    table = _table("trainable", "parameters")
    table.columns[1].justify = "right"
    for role, count in by_role.items():
        table.add_row(role, show_count(count))
    share = show_percent(num_trainable / max(1, num_total))
    table.add_row("in all", f"{show_count(num_trainable)} of {show_count(num_total)} ({share})")
    return table


def print_inspection(found: Inspection) -> None:
    """A model in numbers, the methods that can train it, and what to mind."""
    console = _console(width=110)
    table = _table("", "")
    table.show_header = False
    for name, value in found.rows():
        table.add_row(name, value)
    console.print(found.id, style="bold", highlight=False)
    console.print(table)
    methods = _table("method", "trained at its defaults", "")
    for row in found.method_rows():
        methods.add_row(*_plain(row))
    console.print()
    console.print(methods)
    if found.mind:
        console.print("\nto mind")
        for text in found.mind:
            console.print(f"  {text}", highlight=False, markup=False)


def print_evaluation(found: Evaluation) -> None:
    """Loss and metrics, and the loss by position where it was asked for."""
    console = _console()
    table = _table("", "")
    table.show_header = False
    for name, value in found.rows():
        table.add_row(name, value)
    if found.rows():
        console.print(table)
    lines = found.context_rows()
    if lines:
        contexts = _table(*lines[0])
        for line in lines[1:]:
            contexts.add_row(*line)
        console.print("loss by position, in nats per token", highlight=False)
        console.print(contexts)


def print_summary(summary: Summary) -> None:
    """What was trained, what it took, what it brought, and what to do next."""
    console = _console()
    table = _table("", "")
    table.show_header = False
    for name, value in summary.rows():
        table.add_row(name, value)
    console.print(_parameters(summary.trainable_by_role, summary.num_trainable, summary.num_total))
    console.print()
    console.print(table)
    console.print("\nnext")
    for command in summary.next_commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
