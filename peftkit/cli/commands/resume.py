"""Resume an interrupted run."""

from __future__ import annotations

import argparse

from peftkit.cli.command import OVERRIDES, Command, arg, positive_int, recipe_path

COMMAND = Command(
    "resume",
    "resume an interrupted run",
    (
        arg("run", metavar="RUN"),
        arg(
            "--allow-changed",
            action="append",
            default=[],
            metavar="WHAT",
            help="resume although this changed: data, recipe, base, tokenizer or versions",
        ),
        arg("--recipe", metavar="FILE", help="recipe of the run, needed if it held secrets"),
        OVERRIDES,
        arg("--gpus", type=positive_int, metavar="N", help="GPUs (on a CPU: processes), where not as many as before"),
        arg("--take-over", action="store_true", help="take over a run locked by a machine that is gone"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Resume an interrupted run."""
    from peftkit import api
    from peftkit.cli.commands.finetune import print_summary

    summary = api.resume_run(
        arguments.run,
        recipe=recipe_path(arguments),
        overrides=arguments.overrides,
        allow_changed=arguments.allow_changed,
        take_over=arguments.take_over,
        gpus=arguments.gpus,
    )
    print_summary(summary)
    return 0
