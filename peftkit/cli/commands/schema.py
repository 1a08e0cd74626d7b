"""The JSON Schema of recipes."""

from __future__ import annotations

import argparse

from peftkit.cli.command import Command, print_json

COMMAND = Command("schema", "print the JSON Schema of a recipe, for editors", ())


def run(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of recipes."""
    from peftkit.recipe.json_schema import recipe_schema

    print_json(recipe_schema())
    return 0
