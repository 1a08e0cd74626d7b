"""Answers of a finished run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftkit.cli.command import Command, arg, positive_int
from peftkit.errors import Problem, UserError
from peftkit.units import printable

if TYPE_CHECKING:
    from peftkit.api import Conversation

COMMAND = Command(
    "generate",
    "generate answers with the model of a finished run, or chat with it",
    (
        arg("run", metavar="RUN"),
        arg("prompts", metavar="PROMPT", nargs="*", help="what to answer (default: a chat, a line at a time)"),
        arg("--max-new-tokens", metavar="N", type=positive_int, default=128),
        arg("--temperature", metavar="T", type=float, default=0.0, help="draw tokens (default 0: greedy)"),
        arg("--top-p", metavar="P", type=float, default=1.0, help="draw from the most likely tokens up to this share"),
        arg("--seed", metavar="N", type=int, default=0),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Print one answer per prompt, each under its prompt where there are several, or hold a chat."""
    from peftkit import api

    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    prompts = arguments.prompts
    if len(prompts) < 2:
        if not prompts and sys.stdin is None:
            raise UserError(Problem("command line", "no prompt, and no input to read one from", "a prompt"))
        chat = api.open_chat(arguments.run, **options)
        for prompt in prompts or _lines(chat):
            try:
                chat.ask(prompt, show=lambda piece: print(piece, end="", flush=True))
            except UserError as error:
                if prompts or not sys.stdin.isatty():
                    raise
                print(f"peftkit: {printable(str(error))}", file=sys.stderr)  # the next line may be shorter
            print()
        return 0
    for prompt, text in zip(prompts, api.generate(arguments.run, prompts, **options), strict=True):
        print(f"> {prompt}\n{text}\n")
    return 0


def _lines(chat: Conversation) -> Iterator[str]:
    """Yield the lines that are typed or piped in, without empty ones, until their end."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    each = "" if chat.keeps_turns else "; each line is answered by itself, as it was not trained on chats"
    print(f"a line to ask, ctrl-D to end{each}", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line
