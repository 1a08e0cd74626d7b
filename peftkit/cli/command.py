"""The parts of a command: its name, help and arguments, and what several commands share."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from peftkit.errors import Problem, UserError

Argument = tuple[tuple[str, ...], dict[str, object]]


@dataclass(frozen=True)
class Command:
    """One command: its name, its help and its arguments, for argparse."""

    name: str
    help: str
    arguments: tuple[Argument, ...]


def arg(*names: str, **options: object) -> Argument:
    """Return an argument: the names and options of argparse's `add_argument`."""
    return names, options


def positive_int(text: str) -> int:
    """Parse a positive integer. Raises ArgumentTypeError."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}, expected a positive integer")
    return value


RECIPE = arg("recipe", metavar="RECIPE", help="recipe file, or the name of a shipped recipe")
OVERRIDES = arg("overrides", metavar="key=value", nargs="*", default=[], help="dotted keys, values as in YAML")


def recipe_path(arguments: argparse.Namespace) -> str | None:
    """Return the path of --recipe. Raises UserError for overrides without it: a run has its own recipe."""
    if arguments.overrides and not arguments.recipe:
        got, fix = " ".join(arguments.overrides), "to change a run's recipe, edit its resolved.yaml"
        raise UserError(Problem("command line", got, "key=value together with --recipe FILE", fix))
    return str(arguments.recipe) if arguments.recipe else None


def print_json(value: object) -> None:
    """Print a result as JSON to stdout."""
    print(json.dumps(value, indent=2))
