"""Tables on stdout: the plan's decisions and a run's summary."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from peftkit.plan import Plan
from peftkit.report import Summary
from peftkit.units import show_count, show_percent


def _console() -> Console:
    """As wide as the terminal; wide enough for whole rows where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


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
        table.add_row(decision.key, value, decision.source, decision.reason)
    console.print(table)
    if plan.method.trainable_by_role and plan.method.num_parameters:
        console.print()
        console.print(
            _parameters(
                plan.method.trainable_by_role,
                plan.method.num_trainable or 0,
                plan.method.num_parameters,
                plan.method.peft is not None,
            )
        )


def _parameters(by_role: object, num_trainable: int, num_base: int, adds: bool) -> Table:
    total = num_base + num_trainable if adds else num_base
    table = _table("trainable", "parameters")
    table.columns[1].justify = "right"
    for role, count in dict(by_role).items():  # type: ignore[call-overload]
        table.add_row(role, show_count(count))
    table.add_row(
        "in all",
        f"{show_count(num_trainable)} of {show_count(total)} ({show_percent(num_trainable / total)})",
    )
    return table


def print_summary(summary: Summary) -> None:
    """What was trained, what it took, what it brought, and what to do next."""
    console = _console()
    table = _table("", "")
    table.show_header = False
    for name, value in summary.rows():
        table.add_row(name, value)
    console.print(table)
    console.print("\nnext")
    for command in summary.next_commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
