"""A model in numbers, and the methods that can train it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from peftkit.cli.command import Command, arg, print_json
from peftkit.secrets import redact

if TYPE_CHECKING:
    from peftkit.api import Inspection

COMMAND = Command(
    "inspect",
    "show a model's size and memory, and which methods can train it",
    (
        arg("model", metavar="MODEL", help="hub id, folder, config.json, .gguf file or embedded:NAME"),
        arg("--data", metavar="FILE", help="compare its tokens with the compute-optimal number"),
        arg("--trust-remote-code", action="store_true", help="run the model's own code to inspect it"),
        arg("--revision", metavar="COMMIT", help="commit of a hub model; required to trust its code"),
        arg("--json", action="store_true"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Print what a model is, as tables or as JSON."""
    from peftkit import api

    inspection = api.inspect_model(
        arguments.model, data=arguments.data, trust_remote_code=arguments.trust_remote_code, revision=arguments.revision
    )
    if arguments.trust_remote_code:
        print(redact(f"code that comes with {arguments.model} was allowed to run"), file=sys.stderr)
    if arguments.json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection)
    return 0


def print_inspection(inspection: Inspection) -> None:
    """Print a model in numbers, the methods that can train it, and notes."""
    from peftkit.cli.tables import console_of, escape_cells, new_table

    console = console_of(width=110)
    table = new_table("", "")
    table.show_header = False
    for name, value in inspection.rows():
        table.add_row(*escape_cells((name, value)))
    console.print(inspection.id, style="bold", highlight=False)
    console.print(table)
    methods = new_table("method", "trainable at its defaults", "")
    for row in inspection.method_rows():
        methods.add_row(*escape_cells(row))
    console.print()
    console.print(methods)
    if inspection.mind:
        console.print("\nnotes")
        for text in inspection.mind:
            console.print(f"  {text}", highlight=False, markup=False)
