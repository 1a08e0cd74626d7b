"""Answers of a finished run."""

from __future__ import annotations

import argparse

from peftkit.cli.command import Command, arg, positive_int

COMMAND = Command(
    "generate",
    "generate answers with the model of a finished run",
    (
        arg("run", metavar="RUN"),
        arg("prompts", metavar="PROMPT", nargs="+"),
        arg("--max-new-tokens", metavar="N", type=positive_int, default=128),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Print one answer per prompt."""
    from peftkit import api

    for text in api.generate(arguments.run, arguments.prompts, max_new_tokens=arguments.max_new_tokens):
        print(text)
    return 0
