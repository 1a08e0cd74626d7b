"""Every file of a run against its hash."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from peftkit.cli.command import Command, arg, print_json

if TYPE_CHECKING:
    from peftkit.run.verify import Verification

COMMAND = Command(
    "verify",
    "verify every file of a run against its recorded hash",
    (arg("run", metavar="RUN"), arg("--json", action="store_true")),
)


def run(arguments: argparse.Namespace) -> int:
    """Print which files are intact and which are not. Returns 2 where one is not."""

    from peftkit import api

    verification = api.verify_run(arguments.run)
    if arguments.json:
        print_json({**asdict(verification), "path": str(verification.path), "faults": verification.faults})
    else:
        print_verification(verification)
    return 2 if verification.faults else 0


def print_verification(verification: Verification) -> None:
    """Print which files are intact, and the step from which a resume would continue."""
    from peftkit.cli.tables import console_of, escape_cells, new_table

    console = console_of()
    table = new_table("file", "size", "is")
    for row in verification.rows():
        table.add_row(*escape_cells(row))
    console.print(table)
    count = len(verification.faults)
    status = "finished" if verification.is_finished else f"a resume continues from step {verification.newest_step}"
    console.print(f"{count or 'no'} fault{'' if count == 1 else 's'}; {status}")
