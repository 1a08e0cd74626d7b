"""Adapters merged into their base, or into one adapter."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from peftkit.cli.command import Command, arg, positive_int, print_json
from peftkit.errors import Problem, UserError

if TYPE_CHECKING:
    from peftkit.api import MergeReport

COMMAND = Command(
    "merge",
    "merge adapters into their base, and compare the result with the adapted model",
    (
        arg("adapters", metavar="RUN|ADAPTER[*WEIGHT]", nargs="+"),
        arg("--out", metavar="DIR", required=True, help="a new folder"),
        arg(
            "--base",
            choices=("auto", "dequantized", "original"),
            default="auto",
            help="for QLoRA: the dequantized 4-bit base it was trained on (default), or the original",
        ),
        arg("--base-model", metavar="PATH|ID", help="another copy of the same base"),
        arg("--requantize", choices=("nf4",), help="for QLoRA: quantize the merged original to 4-bit"),
        arg("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the base's dtype"),
        arg("--data", metavar="FILE", help="rows to compare on (default: the run's held-out rows)"),
        arg("--combine", choices=("sum", "ties", "dare"), default="sum", help="how to combine adapters"),
        arg("--density", metavar="SHARE", type=float, help="share that ties and dare keep (0.5)"),
        arg("--seed", metavar="N", type=int, help="random seed of dare"),
        arg("--as-adapter", action="store_true", help="write one LoRA adapter, not dense weights"),
        arg("--rank", metavar="N", type=positive_int, help="rank of --as-adapter (default: full, exact)"),
        arg("--force", action="store_true", help="keep a result that differs from the adapted model"),
        arg("--json", action="store_true"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Merge adapters into their base; print how close the result is."""
    from peftkit import api

    paths, weights = zip(*(_parse_weighted_path(text) for text in arguments.adapters), strict=True)
    if arguments.rank and not arguments.as_adapter:
        raise UserError(Problem("--rank", f"{arguments.rank}", "--rank together with --as-adapter"))
    if arguments.as_adapter:
        from peftkit.cli.tables import print_rows

        dense_options = {
            "--base": arguments.base != "auto",
            "--combine": arguments.combine != "sum",
            "--dtype": arguments.dtype,
            "--requantize": arguments.requantize,
            "--data": arguments.data,
            "--base-model": arguments.base_model,
            "--density": arguments.density is not None,
            "--seed": arguments.seed is not None,
            "--force": arguments.force,
        }
        if problems := [
            Problem(flag, "given with --as-adapter", "a dense merge") for flag in dense_options if dense_options[flag]
        ]:
            raise UserError(problems)
        combination = api.combine_adapters(paths, out=arguments.out, weights=weights, rank=arguments.rank)
        if arguments.json:
            print_json(asdict(combination))
        else:
            print_rows(combination.rows())
            print(f"\n{combination.out}")
        return 0
    option_names = ("base", "base_model", "dtype", "data", "combine", "density", "seed", "force")
    options = api.MergeOptions(
        weights=weights,
        requantize=arguments.requantize is not None,
        **{name: getattr(arguments, name) for name in option_names},
    )
    report = api.merge_adapter(paths, out=arguments.out, options=options)
    if arguments.json:
        print_json(report.to_json())
    else:
        print_merge(report)
    return 0


def _parse_weighted_path(text: str) -> tuple[str, float]:
    """Split PATH*0.5 into path and weight; PATH alone has weight 1."""
    path, star, weight = text.rpartition("*")
    if not star or not path:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        fix = "PATH*0.5; a path with a star in it takes a weight: PATH*1"
        raise UserError(Problem("command line", f"the weight {weight!r} of {path}", "a number", fix)) from None


def print_merge(report: MergeReport) -> None:
    """Print the outcome of a merge, and what the other base would give."""
    from peftkit.cli.tables import print_rows

    print_rows(report.rows())
    if report.choices:
        print()
        print_rows(report.choice_rows(), headed=True)
    if report.gain is not None and report.recommended != report.base:
        advice = f"{report.recommended} is better by {report.gain} nats per token on held-out rows"
        print(f"\n{advice}: peftkit merge ... --base {report.recommended}")
    print(f"\n{report.out}")
