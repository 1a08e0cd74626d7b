"""The command line: a table of commands. It parses, calls the API, prints; it decides nothing."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from peftkit import __version__
from peftkit.secrets import redact


@dataclass(frozen=True)
class Command:
    """One command: how it is called, what it does, which function of `cli.commands` runs it."""

    name: str
    help: str
    arguments: tuple[tuple[tuple[str, ...], dict[str, object]], ...]


def _arg(*names: str, **options: object) -> tuple[tuple[str, ...], dict[str, object]]:
    return names, options


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}, expected a positive integer")
    return value


def _lengths(text: str) -> tuple[int, ...]:
    found = tuple(_positive(part) for part in text.split(","))
    if min(found) < 2:
        raise argparse.ArgumentTypeError(f"{text}, expected lengths of at least 2")
    return found


_RECIPE = _arg("recipe", metavar="RECIPE", help="recipe file, or the name of a shipped recipe")
_OVERRIDES = _arg("overrides", metavar="key=value", nargs="*", help="dotted keys, values as in YAML")

COMMANDS: tuple[Command, ...] = (
    Command(
        "finetune",
        "resolve, check and train a recipe",
        (
            _RECIPE,
            _OVERRIDES,
            _arg("--out", metavar="DIR", help="run directory (default: runs/NAME)"),
            _arg(
                "--dry-run",
                action="store_true",
                help="print every decision and where it came from; train nothing",
            ),
        ),
    ),
    Command(
        "plan",
        "what is trained, what it takes, what fits, and why",
        (
            _RECIPE,
            _OVERRIDES,
            _arg("--gpu", metavar="NAME|SIZE|this", default="this", help="rtx4090, h100-80gb, 24GiB, ..."),
            _arg("--trace", action="store_true", help="run the real code on shapes: exact, some seconds"),
            _arg("--measure", action="store_true", help="three real steps here, on random weights"),
            _arg("--json", action="store_true"),
        ),
    ),
    Command(
        "check",
        "the data gate: tokens and mask of samples, and checks that pass, warn or fail",
        (
            _RECIPE,
            _OVERRIDES,
            _arg("--html", metavar="FILE", help="write a page as well"),
            _arg("--full", action="store_true", help="near duplicates among all rows, not a sample"),
            _arg("--json", action="store_true"),
        ),
    ),
    Command(
        "inspect",
        "what a model is, what it takes, and which methods can train it",
        (
            _arg("model", metavar="MODEL", help="hub id, folder, config.json, .gguf file or embedded:NAME"),
            _arg("--data", metavar="FILE", help="compare its tokens with the compute-optimal number"),
            _arg("--trust-remote-code", action="store_true", help="run the model's own code to look at it"),
            _arg("--revision", metavar="COMMIT", help="of a hub model; needed to trust its code"),
            _arg("--json", action="store_true"),
        ),
    ),
    Command(
        "convert",
        "pickled weights as safetensors, read where they can do no harm",
        (
            _arg(
                "path",
                metavar="PATH",
                help="a folder with pytorch_model*.bin or adapter_model.bin, or one file",
            ),
            _arg("--out", metavar="DIR", required=True, help="a new folder"),
        ),
    ),
    Command(
        "resume",
        "go on with an interrupted run",
        (
            _arg("run", metavar="RUN"),
            _arg(
                "--allow-changed",
                action="append",
                default=[],
                metavar="WHAT",
                help="go on though this changed: data, recipe, base, tokenizer or versions",
            ),
            _arg("--recipe", metavar="FILE", help="what the run was made of, where that held secrets"),
            _OVERRIDES,
            _arg("--take-over", action="store_true", help="a machine that is gone did not release the run"),
        ),
    ),
    Command(
        "diagnose",
        "is quality lagging, why, and what to do, with every number",
        (
            _arg("run", metavar="RUN|ADAPTER"),
            _arg("--recipe", metavar="FILE", help="what an adapter from elsewhere was trained by"),
            _OVERRIDES,
            _arg(
                "--out",
                metavar="DIR",
                help="for what is found of it (ADAPTER-diagnosis)",
            ),
            _arg("--anew", action="store_true", help="measure again what a run said of itself"),
            _arg("--json", action="store_true"),
        ),
    ),
    Command(
        "verify",
        "read every file of a run again, against what was written",
        (_arg("run", metavar="RUN"), _arg("--json", action="store_true")),
    ),
    Command(
        "reproduce",
        "train a finished run again, and compare every number",
        (
            _arg("run", metavar="RUN"),
            _arg("--out", metavar="DIR", help="a new folder; RUN-again unless given"),
            _arg("--recipe", metavar="FILE", help="what the run was made of, where that held secrets"),
            _OVERRIDES,
        ),
    ),
    Command(
        "generate",
        "ask the model of a finished run",
        (
            _arg("run", metavar="RUN"),
            _arg("prompts", metavar="PROMPT", nargs="+"),
            _arg("--max-new-tokens", metavar="N", type=_positive, default=128),
        ),
    ),
    Command(
        "eval",
        "measure a result again: loss and metrics, or loss by position",
        (
            _arg("run", metavar="RUN|ADAPTER"),
            _arg("--data", metavar="FILE", help="rows to measure on (default: those held out in the run)"),
            _arg("--context", metavar="N,N,...", type=_lengths, default=(), help="loss by position"),
            _arg("--json", action="store_true"),
        ),
    ),
    Command(
        "merge",
        "dense weights from adapters and their base, compared with what was trained",
        (
            _arg("adapters", metavar="RUN|ADAPTER[*WEIGHT]", nargs="+"),
            _arg("--out", metavar="DIR", required=True, help="a new folder"),
            _arg(
                "--base",
                choices=("auto", "dequantized", "original"),
                default="auto",
                help="of QLoRA: the 4-bit weights that it was trained on (default), or those before",
            ),
            _arg("--base-model", metavar="PATH|ID", help="another place of the same base"),
            _arg("--requantize", choices=("nf4",), help="of QLoRA: write the original base's sum in 4-bit"),
            _arg("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as the base's files"),
            _arg("--data", metavar="FILE", help="rows to compare on (default: those held out in the run)"),
            _arg("--combine", choices=("sum", "ties", "dare"), default="sum", help="of several adapters"),
            _arg("--density", metavar="SHARE", type=float, help="kept by ties and dare (0.5)"),
            _arg("--seed", metavar="N", type=int, help="of dare"),
            _arg("--as-adapter", action="store_true", help="write one LoRA adapter, not dense weights"),
            _arg("--rank", metavar="N", type=_positive, help="of --as-adapter (default: all, exactly)"),
            _arg("--force", action="store_true", help="keep a result that is not what was trained"),
            _arg("--json", action="store_true"),
        ),
    ),
    Command(
        "export",
        "what was trained in the form that others read: PEFT, vLLM, GGUF, Ollama, the hub",
        (
            _arg("path", metavar="RUN|ADAPTER|MODEL"),
            _arg("--to", required=True, metavar="FORMAT", help="adapter, safetensors, gguf, ollama or hub"),
            _arg("--out", metavar="DIR", help="a new folder"),
            _arg("--for", dest="engine", metavar="ENGINE", help="of adapter: vllm"),
            _arg("--dtype", metavar="TYPE", help="of the weights; gguf: f32, f16, bf16, q8_0, q4_k_m, ..."),
            _arg("--base", choices=("dequantized", "original"), help="of QLoRA, as in merge"),
            _arg("--base-model", metavar="PATH|ID", help="another place of the same base"),
            _arg("--data", metavar="FILE", help="rows to compare a merged model on"),
            _arg("--lora", action="store_true", help="of gguf and ollama: the adapter alone"),
            _arg("--pre", metavar="NAME", help="of gguf: the pre-tokenizer, where it is not recognised"),
            _arg("--repo", metavar="OWNER/NAME", help="of hub: where to push"),
            _arg("--public", action="store_true", help="of hub: for all to see (default: private)"),
            _arg("--revision", metavar="BRANCH", help="of hub"),
            _arg("--force", action="store_true", help="keep what is not what was trained, as in merge"),
        ),
    ),
    Command(
        "recipes",
        "list, show or start recipes",
        (
            _arg("action", choices=("list", "show", "new")),
            _arg("names", nargs="*", metavar="NAME", help="show: a shipped recipe; new: MODEL METHOD"),
        ),
    ),
    Command("schema", "print the JSON Schema of a recipe, for editors", ()),
    Command("env", "print versions and the device", (_arg("--json", action="store_true"),)),
)


FUNCTIONS = {
    "check": "check_data",
    "diagnose": "diagnose_run",
    "eval": "evaluate",
    "inspect": "inspect_model",
    "plan": "plan_recipe",
}  # where Python has taken the name


class _Parser(argparse.ArgumentParser):
    """argparse, whose messages quote what was typed: less what is secret in it."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="peftkit",
        description="Parameter-efficient fine-tuning from one short recipe.",
        epilog="Exit codes: 0 done, 2 yours to mend, 1 our fault, 130 and 143 interrupted (resumable).",
    )
    parser.add_argument("--version", action="version", version=f"peftkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=f"{command.help}.")
        for names, options in command.arguments:
            sub.add_argument(*names, **options)  # type: ignore[arg-type]
    return parser


def _quiet_libraries() -> None:
    """The libraries' own chatter would tear the display; what matters of it, peftkit says itself."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "true"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("DATASETS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, letting overrides stand anywhere: argparse alone takes them only right after the recipe."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    options = [text for text in rest if text.startswith("-")]
    if options or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(options or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _tell_fault(error: Exception) -> int:
    """An error that nobody foresaw: where it happened, without secrets, and what to do with it."""
    import traceback

    print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
    print(
        "peftkit: this is a fault of peftkit, not yours: please report it with the lines above "
        "(tokens and passwords were taken out)",
        file=sys.stderr,
    )
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    arguments = _parse(argv)
    _quiet_libraries()
    from peftkit.cli import commands
    from peftkit.errors import PeftkitError, UserError

    try:
        return int(getattr(commands, FUNCTIONS.get(arguments.command, arguments.command))(arguments))
    except UserError as error:
        commands.tell_problems(error)
        return error.exit_code
    except PeftkitError as error:
        print(f"peftkit: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("peftkit: interrupted; nothing was lost", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:  # noqa: BLE001  Python itself would print the traceback with every secret in it
        return _tell_fault(error)
