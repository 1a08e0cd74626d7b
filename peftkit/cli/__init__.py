"""The command line: a table of commands that parses, calls the API and prints; it decides nothing."""

from __future__ import annotations

import argparse
import os
import re
import select
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from peftkit import __version__
from peftkit.cli.commands import MODULES
from peftkit.errors import PeftkitError, Problem, UserError, nearest
from peftkit.ranks import launched
from peftkit.secrets import redact
from peftkit.units import printable

COMMANDS = tuple(module.COMMAND for module in MODULES)


# what other tools call our commands
_COMMANDS_ELSEWHERE = {
    **dict.fromkeys(("train", "sft", "tune", "fit", "run", "fine-tune"), "finetune"),
    **dict.fromkeys(("chat", "infer", "inference", "predict", "ask", "cli"), "generate"),
    **dict.fromkeys(("evaluate", "test", "benchmark"), "eval"),
    **dict.fromkeys(("preprocess", "validate", "data", "lint"), "check"),
    **dict.fromkeys(("estimate", "memory", "dry"), "plan"),
    **dict.fromkeys(("info", "show", "model"), "inspect"),
    **dict.fromkeys(("push", "upload", "gguf", "ollama", "save"), "export"),
    **dict.fromkeys(("continue", "restart"), "resume"),
    **dict.fromkeys(("init", "new", "config"), "recipes"),
    **dict.fromkeys(("doctor", "system", "version"), "env"),
}
_EXTRAS = {"qlora": {"bitsandbytes"}, "gguf": {"gguf"}, "notebook": {"ipykernel", "nbclient", "nbformat"}}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that redacts secrets from its error messages, which quote what was typed."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.search(r"argument COMMAND: invalid choice: '([^']+)'", message):
            names = [command.name for command in COMMANDS]
            alike = _COMMANDS_ELSEWHERE.get(unknown[1]) or next(iter(nearest(unknown[1], names)), "")
            message = f"no command {unknown[1]!r}; " + (
                f"did you mean {alike}?" if alike else f"known: {', '.join(names)}"
            )
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
        hints = [_override_of(text, unparsed) for text in options] if hasattr(arguments, "overrides") else []
        hint = "; settings are key=value: " + ", ".join(filter(None, hints)) if any(hints) else ""
        parser.error(f"unrecognized arguments: {' '.join(options or unparsed)}{hint}")
    if unparsed:
        arguments.overrides = [*arguments.overrides, *unparsed]
    return arguments


def _override_of(option: str, unparsed: Sequence[str]) -> str:
    """Return the override that an option of another tool stands for; empty where it is none."""
    from peftkit.recipe.document import parse_value
    from peftkit.recipe.explain import homes_of_key
    from peftkit.recipe.vocabulary import translate_key

    name, equals, value = option.lstrip("-").replace("-", "_").partition("=")
    place = list(unparsed).index(option) + 1
    if not equals:
        value = unparsed[place] if place < len(unparsed) and not unparsed[place].startswith("-") else "true"
    try:
        translation, _ = translate_key(name, parse_value(value), {})
    except UserError:
        return ""
    homes = homes_of_key(name)
    return translation.replace(": ", "=", 1) if translation else f"{homes[0]}={value}" if homes else ""


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
    is_lead = launched().is_lead
    if not is_lead:  # of the processes that train together one talks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  until the process ends
    try:
        return int(module.run(arguments))
    except UserError as error:
        if is_lead or not error.is_heard:
            print_problems(error)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "peftkit":
            raise
        extra = next((extra for extra, names in _EXTRAS.items() if error.name in names), None)
        fix = f"pip install 'peftkit[{extra}]'" if extra else f"pip install {(error.name or 'it').partition('.')[0]}"
        print_problems(
            UserError(Problem(f"peftkit {arguments.command}", f"no package {error.name}", "it installed", fix))
        )
        return UserError.exit_code
    except PeftkitError as error:
        if str(error) and (is_lead or not error.is_heard):  # what ranks said is not said again
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
