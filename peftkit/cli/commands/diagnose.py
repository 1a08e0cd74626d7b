"""The verdict on a run or an adapter."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from peftkit.cli.command import OVERRIDES, Command, arg, print_json, recipe_path

if TYPE_CHECKING:
    from peftkit.diagnose.verdict import Verdict

COMMAND = Command(
    "diagnose",
    "judge the quality of a run: cause, evidence and recommended action",
    (
        arg("run", metavar="RUN|ADAPTER"),
        arg("--recipe", metavar="FILE", help="recipe of an adapter trained elsewhere"),
        OVERRIDES,
        arg("--out", metavar="DIR", help="folder of an adapter's diagnosis (default: ADAPTER-diagnosis)"),
        arg("--anew", action="store_true", help="measure again, ignoring the run's own verdict"),
        arg("--json", action="store_true"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Print the verdict on a run or an adapter."""
    from peftkit import api

    verdict = api.diagnose_run(
        arguments.run,
        recipe=recipe_path(arguments),
        overrides=arguments.overrides,
        out=arguments.out,
        anew=arguments.anew,
    )
    if arguments.json:
        print_json(verdict.to_json())
    else:
        print_verdict(verdict)
    return 0


def print_verdict(verdict: Verdict) -> None:
    """Print a verdict: quality, cause, evidence and action."""
    from peftkit.cli.tables import console_of, escape_cells, new_table

    table = new_table("", "")
    table.show_header = False
    for name, value in verdict.rows():
        table.add_row(*escape_cells((name, value)))
    console_of().print(table)
