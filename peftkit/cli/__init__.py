"""The command line: a table of commands that parses, calls the API and prints; it decides nothing."""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from peftkit import __version__
from peftkit.cli.commands import MODULES
from peftkit.errors import PeftkitError, UserError
from peftkit.secrets import redact
from peftkit.units import printable

COMMANDS = tuple(module.COMMAND for module in MODULES)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that redacts secrets from its error messages, which quote what was typed."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments, with overrides anywhere: argparse alone takes them only right after the recipe."""
    parser = _Parser(
        prog="peftkit",
        description="Parameter-efficient fine-tuning from one short recipe.",
        epilog="Exit codes: 0 done, 2 problems to fix, 1 internal bug, 130 and 143 interrupted (resumable).",
    )
    parser.add_argument("--version", action="version", version=f"peftkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.help, description=f"{command.help}.")
        for names, settings in command.arguments:
            subparser.add_argument(*names, **settings)
    arguments, unparsed = parser.parse_known_args(argv)
    options = [text for text in unparsed if text.startswith("-")]
    if options or (unparsed and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(options or unparsed)}")
    if unparsed:
        arguments.overrides = [*arguments.overrides, *unparsed]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    arguments = _parse_arguments(argv)
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "true"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("DATASETS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    module = next(module for module in MODULES if module.COMMAND.name == arguments.command)
    try:
        return int(module.run(arguments))
    except UserError as error:
        print_problems(error)
        return error.exit_code
    except PeftkitError as error:
        print(f"peftkit: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("peftkit: interrupted; nothing was lost", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001  Python itself would print the traceback with every secret in it
        if isinstance(error, BrokenPipeError):
            poll = select.poll()
            for stream in (sys.stdout, sys.stderr):
                poll.register(stream.fileno(), 0)
            if poll.poll(0):  # who read the output has gone, as `| head` does: another pipe may break, too
                sys.stderr.close()
                return 0
        # print an unexpected error's traceback without secrets, and how to report it
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
        print(
            "peftkit: internal error, a bug in peftkit: please report it with the lines above "
            "(tokens and passwords were taken out)",
            file=sys.stderr,
        )
        return 1


def print_problems(error: UserError) -> None:
    """Print all problems of an error, without secrets and terminal control characters."""

    def safe(text: str) -> str:
        return printable(redact(text))

    count = len(error.problems)
    print(f"peftkit: {count} problem{'s' if count > 1 else ''} to fix", file=sys.stderr)
    for problem in error.problems:
        print(f"  {safe(problem.where)}", file=sys.stderr)
        print(f"    got       {safe(problem.got)}", file=sys.stderr)
        print(f"    expected  {safe(problem.expected)}", file=sys.stderr)
        if problem.fix:
            print(f"    fix       {safe(problem.fix)}", file=sys.stderr)
