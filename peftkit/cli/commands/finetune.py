"""Train a recipe, or print its decisions."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from peftkit.cli.command import OVERRIDES, RECIPE, Command, arg, positive_int
from peftkit.errors import Problem, UserError
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
        arg("--gpus", type=positive_int, metavar="N", help="GPUs (on a CPU: processes) to share out each step over"),
        arg("--dry-run", action="store_true", help="print the decisions and where they came from; train nothing"),
        arg("--all", action="store_true", help="with --dry-run: also what is at its plain default"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Train, or with --dry-run print the decisions."""
    from peftkit import api

    if arguments.all and not arguments.dry_run:
        raise UserError(Problem("command line", "--all without --dry-run", "both, or neither"))
    overrides = [*arguments.overrides, *([f"devices.count={arguments.gpus}"] if arguments.gpus else [])]
    if arguments.dry_run:
        recipe = api.load_recipe(arguments.recipe, overrides)
        plan = api.make_plan(recipe)
        if plan.base.inferred and plan.base.trust_remote_code:
            print(redact(f"code that comes with {plan.base.id} ran, to inspect its layers"), file=sys.stderr)
        print_plan(plan, every=arguments.all)
        return 0
    summary = api.finetune(arguments.recipe, overrides, out=arguments.out)
    print_summary(summary)
    return 0


def print_plan(plan: Plan, *, every: bool = True) -> None:
    """Print decided values with source and reason; unless `every`, plain defaults are only counted."""
    from peftkit.cli.tables import console_of, escape_cells, new_table, parameters_table

    console = console_of()
    table = new_table("key", "value", "source", "reason")
    shown = [one for one in plan.decisions if every or one.source != "default" or one.reason]
    for decision in sorted(shown, key=lambda d: d.key):
        value = ", ".join(map(str, decision.value)) if isinstance(decision.value, list) else str(decision.value)
        table.add_row(*escape_cells((decision.key, value, decision.source, decision.reason)))
    console.print(table)
    if num_folded := len(plan.decisions) - len(shown):
        console.print(f"and {num_folded} settings at their defaults: --dry-run --all")
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
