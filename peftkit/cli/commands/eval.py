"""Loss and metrics of a result."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from peftkit.cli.command import Command, arg, positive_int, print_json

if TYPE_CHECKING:
    from peftkit.api import Evaluation


def _context_lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(positive_int(part) for part in text.split(","))
    if min(lengths) < 2:
        raise argparse.ArgumentTypeError(f"{text}, expected lengths of at least 2")
    return lengths


COMMAND = Command(
    "eval",
    "evaluate a result: loss and metrics, or loss by position",
    (
        arg("run", metavar="RUN|ADAPTER"),
        arg("--data", metavar="FILE", help="rows to evaluate on (default: the run's held-out rows)"),
        arg("--context", metavar="N,N,...", type=_context_lengths, default=(), help="loss by position"),
        arg("--json", action="store_true"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Print loss and metrics of a result, or its loss by position."""

    from peftkit import api

    evaluation = api.evaluate_run(arguments.run, data=arguments.data, contexts=arguments.context)
    if arguments.json:
        print_json(asdict(evaluation))
    else:
        print_evaluation(evaluation)
    return 0


def print_evaluation(evaluation: Evaluation) -> None:
    """Print loss and metrics, and the loss by position where it was asked for."""
    from peftkit.cli.tables import console_of, escape_cells, new_table

    console = console_of()
    table = new_table("", "")
    table.show_header = False
    for name, value in evaluation.rows():
        table.add_row(*escape_cells((name, value)))
    if evaluation.rows():
        console.print(table)
    lines = evaluation.context_rows()
    if lines:
        contexts = new_table(*lines[0])
        for line in lines[1:]:
            contexts.add_row(*escape_cells(line))
        console.print("loss by position, in nats per token", highlight=False)
        console.print(contexts)
