"""One function per command: call the API, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from peftkit.errors import Problem, UserError
from peftkit.secrets import redact
from peftkit.units import printable, show_bytes, show_count


def tell_problems(error: UserError) -> None:
    """All problems of an error, without what is secret in them and what would steer a terminal."""

    def said(text: str) -> str:
        return printable(redact(text))

    count = len(error.problems)
    print(f"peftkit: {count} problem{'s' if count > 1 else ''} to mend", file=sys.stderr)
    for problem in error.problems:
        print(f"  {said(problem.where)}", file=sys.stderr)
        print(f"    got       {said(problem.got)}", file=sys.stderr)
        print(f"    expected  {said(problem.expected)}", file=sys.stderr)
        if problem.fix:
            print(f"    fix       {said(problem.fix)}", file=sys.stderr)


def finetune(arguments: argparse.Namespace) -> int:
    """Train, or with --dry-run print the decisions."""
    from peftkit import api

    loaded = api.load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        from peftkit.cli.tables import print_plan

        plan = api.make_plan(loaded)
        if plan.base.inferred and plan.base.trust_remote_code:
            print(redact(f"code that comes with {plan.base.id} ran, to look at its layers"), file=sys.stderr)
        print_plan(plan)
        return 0
    from peftkit.cli.display import open_display
    from peftkit.cli.tables import print_summary

    with open_display() as display:
        summary = api.finetune(loaded, out=arguments.out, observer=display.show)
    print_summary(summary)
    return 0


def plan_recipe(arguments: argparse.Namespace) -> int:
    """Print what a recipe takes on a device. Returns 2 where it does not fit."""
    from peftkit import api
    from peftkit.cli.tables import print_account

    loaded = api.load_recipe(arguments.recipe, arguments.overrides)
    if arguments.measure or arguments.trace:
        from peftkit.cli.display import quiet_loggers

        quiet_loggers()
    found = api.plan_recipe(loaded, gpu=arguments.gpu, trace=arguments.trace, measure=arguments.measure)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_account(found)
    return 2 if found.fit.verdict == "does not fit" else 0


def check_data(arguments: argparse.Namespace) -> int:
    """Show what is learnt, and what every check says. Returns 2 where one fails."""
    from pathlib import Path

    from peftkit import api
    from peftkit.cli.data import print_data_report
    from peftkit.cli.display import quiet_loggers

    quiet_loggers()
    if arguments.html and not Path(arguments.html).absolute().parent.is_dir():
        raise UserError(Problem("--html", arguments.html, "a file in a folder that is there"))
    loaded = api.load_recipe(arguments.recipe, arguments.overrides)
    report = api.check_data(loaded, full=arguments.full)
    if arguments.html:
        from peftkit.report.data_page import data_page
        from peftkit.rundir import write_text

        title = f"The data of {Path(loaded.name).name}"
        page = data_page(report.to_json(), report.rows(), title=title)
        try:
            write_text(Path(arguments.html), page)
        except OSError as error:
            got = f"{arguments.html}, which cannot be written ({error.strerror})"
            raise UserError(Problem("--html", got, "a file in a folder that can be written")) from None
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_data_report(report)
    return 2 if report.failed else 0


def convert(arguments: argparse.Namespace) -> int:
    """Convert pickled weights; say what was written and what was left."""
    from peftkit import api

    made = api.convert_weights(arguments.path, out=arguments.out)
    for name in made.left:
        print(redact(f"not taken along: {name}"), file=sys.stderr)
    tensors = f"{show_count(made.num_tensors)} tensors, {show_bytes(made.num_bytes)}"
    print(f"{made.out}: {tensors} in {', '.join(made.files)}")
    return 0


def resume(arguments: argparse.Namespace) -> int:
    """Go on with a run."""
    from peftkit import api
    from peftkit.cli.display import open_display
    from peftkit.cli.tables import print_summary

    with open_display() as display:
        summary = api.resume_run(
            arguments.run,
            recipe=_recipe_file(arguments),
            overrides=arguments.overrides,
            allow_changed=arguments.allow_changed,
            take_over=arguments.take_over,
            observer=display.show,
        )
    print_summary(summary)
    return 0


def diagnose_run(arguments: argparse.Namespace) -> int:
    """Print the verdict on a run or an adapter."""
    from peftkit import api
    from peftkit.cli.display import open_display
    from peftkit.cli.tables import print_verdict

    with open_display() as display:
        verdict = api.diagnose_run(
            arguments.run,
            recipe=_recipe_file(arguments),
            overrides=arguments.overrides,
            out=arguments.out,
            anew=arguments.anew,
            observer=display.show,
        )
    if arguments.json:
        print(json.dumps(verdict.to_json(), indent=2))
    else:
        print_verdict(verdict)
    return 0


def _recipe_file(arguments: argparse.Namespace) -> str | None:
    """What --recipe names. Raises UserError for overrides of nothing: a run has its recipe already."""
    if arguments.overrides and not arguments.recipe:
        got, fix = " ".join(arguments.overrides), "to change a run's recipe, edit its resolved.yaml"
        raise UserError(Problem("command line", got, "key=value together with --recipe FILE", fix))
    return str(arguments.recipe) if arguments.recipe else None


def verify(arguments: argparse.Namespace) -> int:
    """Print what is whole and what is not. Returns 2 where something is not."""

    from peftkit import api
    from peftkit.cli.tables import print_verification

    found = api.verify_run(arguments.run)
    if arguments.json:
        print(json.dumps({**asdict(found), "faults": found.faults}, indent=2, default=str))
    else:
        print_verification(found)
    return 2 if found.faults else 0


def reproduce(arguments: argparse.Namespace) -> int:
    """Train a finished run again and print how it compares. Returns 1 where it differs."""
    from peftkit import api
    from peftkit.cli.display import open_display
    from peftkit.cli.tables import print_reproduction

    with open_display() as display:
        found = api.reproduce_run(
            arguments.run,
            out=arguments.out,
            recipe=_recipe_file(arguments),
            overrides=arguments.overrides,
            observer=display.show,
        )
    print_reproduction(found)
    return 0 if found.is_equal else 1


def generate(arguments: argparse.Namespace) -> int:
    """Print one answer per prompt."""
    from peftkit import api
    from peftkit.cli.display import quiet_loggers

    quiet_loggers()
    for text in api.generate(arguments.run, arguments.prompts, max_new_tokens=arguments.max_new_tokens):
        print(text)
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Merge adapters into their base; say how true the result is."""
    from peftkit import api
    from peftkit.cli.ship import open_bytes_display, print_merge

    paths, weights = zip(*(_weighted(text) for text in arguments.adapters), strict=True)
    if arguments.rank and not arguments.as_adapter:
        raise UserError(Problem("--rank", f"{arguments.rank}", "--as-adapter beside it"))
    if arguments.as_adapter:
        return _as_adapter(arguments, paths, weights)
    same = ("base", "base_model", "dtype", "data", "combine", "density", "seed", "force")
    options = api.MergeOptions(
        weights=weights,
        requantize=arguments.requantize is not None,
        **{name: getattr(arguments, name) for name in same},
    )
    with open_bytes_display() as show:
        report = api.merge_adapter(paths, out=arguments.out, options=options, observer=show)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_merge(report)
    return 0


def _as_adapter(arguments: argparse.Namespace, paths: Sequence[str], weights: Sequence[float]) -> int:
    """Several adapters as one, with none of what only dense weights have."""
    from peftkit import api
    from peftkit.cli.tables import print_rows

    given = {
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
    if wrong := [Problem(flag, "given with --as-adapter", "dense weights") for flag in given if given[flag]]:
        raise UserError(wrong)
    found = api.combine_adapters(paths, out=arguments.out, weights=weights, rank=arguments.rank)
    if arguments.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        print_rows(found.rows())
        print(f"\n{found.out}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Export in a form that others read; say what was written."""
    from peftkit import api
    from peftkit.cli.ship import open_bytes_display, print_export

    same = ("to", "out", "dtype", "base", "base_model", "data", "force", "lora", "pre", "repo", "public")
    options = api.ExportOptions(
        engine=arguments.engine,
        revision=arguments.revision,
        **{name: getattr(arguments, name) for name in same},
    )
    with open_bytes_display() as show:
        found = api.export_adapter(arguments.path, options, observer=show)
    print_export(found)
    return 0


def _weighted(text: str) -> tuple[str, float]:
    """A path with its weight: PATH*0.5, or PATH alone."""
    path, star, weight = text.rpartition("*")
    if not star or not path:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        fix = "PATH*0.5; a path with a star in it takes a weight: PATH*1"
        raise UserError(
            Problem("command line", f"the weight {weight!r} of {path}", "a number", fix)
        ) from None


def inspect_model(arguments: argparse.Namespace) -> int:
    """Print what a model is, as tables or as JSON."""
    from peftkit import api
    from peftkit.cli.tables import print_inspection

    found = api.inspect_model(
        arguments.model,
        data=arguments.data,
        trust_remote_code=arguments.trust_remote_code,
        revision=arguments.revision,
    )
    if arguments.trust_remote_code:
        print(redact(f"code that comes with {arguments.model} was allowed to run"), file=sys.stderr)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_inspection(found)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Print loss and metrics of a result, or its loss by position."""

    from peftkit import api
    from peftkit.cli.display import quiet_loggers
    from peftkit.cli.tables import print_evaluation

    quiet_loggers()
    found = api.evaluate_run(arguments.run, data=arguments.data, contexts=arguments.context)
    if arguments.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        print_evaluation(found)
    return 0


def recipes(arguments: argparse.Namespace) -> int:
    """List, show, or write a new recipe to stdout."""
    from peftkit.recipe.shipped import list_shipped, new_recipe, show_shipped

    names = arguments.names
    wanted = {"list": 0, "show": 1, "new": 2}[arguments.action]
    if len(names) != wanted:
        usage = {"list": "list", "show": "show NAME", "new": "new MODEL METHOD"}[arguments.action]
        raise UserError(Problem("command line", f"{len(names)} names", f"peftkit recipes {usage}"))
    if arguments.action == "list":
        for recipe in list_shipped():
            print(f"{recipe.name:<18} {recipe.title}")
    elif arguments.action == "show":
        print(show_shipped(names[0]), end="")
    else:
        from peftkit.errors import did_you_mean
        from peftkit.methods import METHODS

        if names[1] not in METHODS:
            raise UserError(
                Problem("command line", repr(names[1]), "a method", did_you_mean(names[1], list(METHODS)))
            )
        print(new_recipe(names[0], names[1]), end="")
    return 0


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of recipes."""
    from peftkit.recipe.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
    return 0


def env(arguments: argparse.Namespace) -> int:
    """Print versions and the device."""

    from peftkit.model.hardware import detect_device_light
    from peftkit.prepare.environment import versions

    found = {"versions": versions(), "device": asdict(detect_device_light())}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for section, values in found.items():
        print(section)
        for name, value in values.items():
            print(f"  {name:<18} {'not installed' if value is None else value}")
    return 0
