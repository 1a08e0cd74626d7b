"""Train a recipe, or print its decisions."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from peftkit.cli.command import OVERRIDES, RECIPE, Command, arg
from peftkit.secrets import redact

if TYPE_CHECKING:
    from peftkit.plan import Plan
    from peftkit.report import Summary

COMMAND = Command(
    "finetune",
    "resolve, check and train a recipe",
    (
        RECIPE,
        OVERRIDES,
        arg("--out", metavar="DIR", help="run directory (default: runs/NAME)"),
        arg("--dry-run", action="store_true", help="print every decision and where it came from; train nothing"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Train, or with --dry-run print the decisions."""
    from peftkit import api

    recipe = api.load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        plan = api.make_plan(recipe)
        if plan.base.inferred and plan.base.trust_remote_code:
            print(redact(f"code that comes with {plan.base.id} ran, to inspect its layers"), file=sys.stderr)
        print_plan(plan)
        return 0

    summary = api.finetune(recipe, out=arguments.out)
    print_summary(summary)
    return 0


def print_plan(plan: Plan) -> None:
    """Print every decided value with its source and reason."""
    from peftkit.cli.tables import console_of, escape_cells, new_table, parameters_table

    console = console_of()
    table = new_table("key", "value", "source", "reason")
    for decision in sorted(plan.decisions, key=lambda d: d.key):
        value = ", ".join(map(str, decision.value)) if isinstance(decision.value, list) else str(decision.value)
        table.add_row(*escape_cells((decision.key, value, decision.source, decision.reason)))
    console.print(table)
    method = plan.method
    if method.trainable_by_role and method.num_trainable and method.num_parameters:
        num_added = method.num_trainable if method.peft else 0
        console.print()
        console.print(
            parameters_table(method.trainable_by_role, method.num_trainable, method.num_parameters + num_added)
        )


def print_summary(summary: Summary) -> None:
    """Print the parameters trained, the cost, the result and the next commands."""
    from peftkit.cli.tables import console_of, escape_cells, new_table, parameters_table

    console = console_of()
    table = new_table("", "")
    table.show_header = False
    for name, value in summary.rows():
        table.add_row(*escape_cells((name, value)))
    console.print(parameters_table(summary.trainable_by_role, summary.num_trainable, summary.num_total))
    console.print()
    console.print(table)
    console.print("\nnext")
    for command in summary.next_commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
