"""Train a finished run again, and compare."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from peftkit.cli.command import OVERRIDES, Command, arg, recipe_path

if TYPE_CHECKING:
    from peftkit.run.reproduce import Reproduction

COMMAND = Command(
    "reproduce",
    "train a finished run again, and compare every number",
    (
        arg("run", metavar="RUN"),
        arg("--out", metavar="DIR", help="a new folder (default: RUN-again)"),
        arg("--recipe", metavar="FILE", help="recipe of the run, needed if it held secrets"),
        OVERRIDES,
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Train a finished run again and print how it compares. Returns 1 where it differs."""
    from peftkit import api

    reproduction = api.reproduce_run(
        arguments.run, out=arguments.out, recipe=recipe_path(arguments), overrides=arguments.overrides
    )
    print_reproduction(reproduction)
    return 0 if reproduction.is_equal else 1


def print_reproduction(reproduction: Reproduction) -> None:
    """Print how a reproduced run compares with the original."""
    from peftkit.cli.tables import console_of, escape_cells, new_table

    table = new_table("", "")
    table.show_header = False
    for row in reproduction.rows():
        table.add_row(*escape_cells(row))
    console_of().print(table)
