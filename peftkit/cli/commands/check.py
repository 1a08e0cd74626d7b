"""The data gate: samples with their loss mask, and every check."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftkit.cli.command import OVERRIDES, RECIPE, Command, arg, print_json
from peftkit.errors import Problem, UserError

COMMAND = Command(
    "check",
    "check the data: tokens and loss mask of samples, and checks that pass, warn or fail",
    (
        RECIPE,
        OVERRIDES,
        arg("--html", metavar="FILE", help="also write an HTML page"),
        arg("--full", action="store_true", help="search all rows for near duplicates, not a sample"),
        arg("--json", action="store_true"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Print samples with their trained tokens, and the result of every check. Returns 2 where one fails."""

    from peftkit import api
    from peftkit.cli.data_report import print_data_report

    if arguments.html and not Path(arguments.html).absolute().parent.is_dir():
        raise UserError(Problem("--html", arguments.html, "a file in an existing folder"))
    recipe = api.load_recipe(arguments.recipe, arguments.overrides)
    report = api.check_data(recipe, full=arguments.full)
    if arguments.html:
        from peftkit.report.data_page import data_page
        from peftkit.rundir import write_text

        title = f"The data of {Path(recipe.name).name}"
        page = data_page(report.to_json(), report.rows(), title=title)
        try:
            write_text(Path(arguments.html), page)
        except OSError as error:
            got = f"{arguments.html}, which cannot be written ({error.strerror})"
            raise UserError(Problem("--html", got, "a file in a writable folder")) from None
    if arguments.json:
        print_json(report.to_json())
    else:
        print_data_report(report)
    return 2 if report.failed else 0
