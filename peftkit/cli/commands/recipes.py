"""Shipped recipes, and new ones."""

from __future__ import annotations

import argparse

from peftkit.cli.command import Command, arg
from peftkit.errors import Problem, UserError, did_you_mean

COMMAND = Command(
    "recipes",
    "list, show or start recipes",
    (
        arg("action", choices=("list", "show", "new")),
        arg("names", nargs="*", metavar="NAME", help="show: a shipped recipe; new: MODEL METHOD"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """List, show, or write a new recipe to stdout."""
    from peftkit.recipe.shipped import list_shipped, new_recipe, show_shipped

    names = arguments.names
    num_expected = {"list": 0, "show": 1, "new": 2}[arguments.action]
    if len(names) != num_expected:
        usage = {"list": "list", "show": "show NAME", "new": "new MODEL METHOD"}[arguments.action]
        raise UserError(Problem("command line", f"{len(names)} names", f"peftkit recipes {usage}"))
    if arguments.action == "list":
        for recipe in list_shipped():
            print(f"{recipe.name:<18} {recipe.title}")
    elif arguments.action == "show":
        print(show_shipped(names[0]), end="")
    else:
        from peftkit.methods import METHODS

        if names[1] not in METHODS:
            raise UserError(Problem("command line", repr(names[1]), "a method", did_you_mean(names[1], list(METHODS))))
        print(new_recipe(names[0], names[1]), end="")
    return 0
