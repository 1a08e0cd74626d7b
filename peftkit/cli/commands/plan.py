"""What a recipe needs on a device: parameters, memory, fit, time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.cli.command import OVERRIDES, Command, arg, positive_int, print_json
from peftkit.errors import Problem, UserError
from peftkit.units import show_bytes, show_count, show_percent, show_seconds

if TYPE_CHECKING:
    from peftkit.api import Account
    from peftkit.recipe import LoadedRecipe

_NO_DATA = "no/data"  # a name of the hub, which a plan does not ask for
COMMAND = Command(
    "plan",
    "show trainable parameters, memory, fit, changes that fit and time, with reasons",
    (
        arg("recipe", metavar="RECIPE|MODEL", help="recipe file or name; or a model alone, to size it without data"),
        OVERRIDES,
        arg("--method", metavar="NAME", help="of a model alone (default: lora)"),
        arg("--length", metavar="N", type=positive_int, help="tokens per row of a model alone"),
        arg("--gpu", metavar="NAME|SIZE|this", default="this", help="rtx4090, h100-80gb, 24GiB, ..."),
        arg("--gpus", type=positive_int, metavar="N", help="so many of them, that share out each step"),
        arg("--trace", action="store_true", help="trace the model on shapes: exact, takes seconds"),
        arg("--measure", action="store_true", help="measure three steps here, on random weights"),
        arg("--json", action="store_true"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Print what a recipe needs on a device. Returns 2 where it does not fit."""
    from peftkit import api

    if arguments.gpus:
        arguments.overrides = [*arguments.overrides, f"devices.count={arguments.gpus}"]
    recipe = _load_recipe(arguments)
    report = api.plan_recipe(recipe, gpu=arguments.gpu, trace=arguments.trace, measure=arguments.measure)
    if arguments.json:
        print_json(report.to_json())
    else:
        print_plan_report(report)
    return 2 if report.fit.verdict == "does not fit" else 0


def _load_recipe(arguments: argparse.Namespace) -> LoadedRecipe:
    """Load the recipe, or for a model alone one without data: every row then has the full length."""
    from peftkit import api
    from peftkit.recipe import override_texts

    name = Path(arguments.recipe)
    is_folder = (name / "config.json").is_file() or name.suffix == ".gguf"
    is_file = name.is_file() or name.suffix in {".yaml", ".yml"}
    is_model = is_folder or (not is_file and ("/" in arguments.recipe or ":" in arguments.recipe))
    if not is_model and (arguments.method or arguments.length):
        got = "--method and --length with a recipe"
        fix = "for a recipe: method.name=... train.max_length=..."
        raise UserError(Problem("command line", got, "a model alone, as owner/name or a folder", fix))
    if not is_model:
        return api.load_recipe(arguments.recipe, arguments.overrides)
    for text in arguments.overrides:
        key = text.partition("=")[0].strip()
        flags = {"method": arguments.method, "method.name": arguments.method, "train.max_length": arguments.length}
        if flags.get(key):
            flag = "--length" if key == "train.max_length" else "--method"
            raise UserError(Problem("command line", f"{flag} {flags[key]} and {text}", "one of them"))
    given = {"base": arguments.recipe, "method": arguments.method or "lora", "data.train": _NO_DATA, "data.eval": None}
    if arguments.length:
        given["train.max_length"] = arguments.length
    return api.load_recipe({}, [*override_texts(given), *arguments.overrides])


def print_plan_report(report: Account) -> None:
    """Print parameters, peak memory by component, fit, nearest changes, time and assumptions."""
    from peftkit.cli.tables import console_of, escape_cells, new_table, parameters_table
    from peftkit.plan.advice import WARNING

    console = console_of()
    plan, memory = report.plan, report.memory
    total = report.num_total
    console.print(f"{report.headline}\n", style="bold", highlight=False, soft_wrap=True)
    console.print(parameters_table(plan.method.trainable_by_role or {}, plan.method.num_trainable or 0, total))
    layers = ", ".join(f"{place}: {show_count(n)}" for place, n in plan.method.trainable_by_layers.items())
    console.print(f"by layers: {layers}\n", highlight=False, soft_wrap=True)
    table = new_table("memory at the peak", "", "", "change this to reduce it")
    table.columns[1].justify = "right"
    for row in report.memory_rows():
        table.add_row(*row)
    console.print(table)
    peaks = ", ".join(f"{peak.phase} {show_bytes(peak.allocated_bytes)}" for peak in memory.peaks)
    console.print(f"\npeaks: {peaks}", highlight=False, soft_wrap=True)
    console.print(f"driven by {report.driver}", highlight=False, soft_wrap=True)
    console.print(report.verdict, style="bold", highlight=False)
    if report.measured_memory is not None:
        measured = report.measured_memory
        line = (
            f"measured in {measured.num_steps} steps on random weights: "
            f"{show_bytes(measured.measured_bytes)} allocated, {show_bytes(measured.predicted_bytes)} predicted "
            f"({measured.error_percent:+.1f} %)"
        )
        if measured.measured_reserved_bytes and measured.predicted_reserved_bytes:
            line += (
                f"; {show_bytes(measured.measured_reserved_bytes)} reserved, "
                f"{show_bytes(measured.predicted_reserved_bytes)} predicted ({measured.reserved_error_percent:+.1f} %)"
            )
        console.print(f"{line}; {show_seconds(measured.step_seconds)} a step", highlight=False, soft_wrap=True)
    if report.changes:
        changes = new_table("change that fits", "needs", "", "costs")
        for change in report.changes:
            row = (" ".join(change.overrides), show_bytes(change.needed_bytes), change.verdict, change.cost)
            changes.add_row(*escape_cells(row))
        console.print(changes)
    work = new_table("", "")
    work.show_header = False
    cost = report.work
    train, batch = plan.train, plan.batch
    cost_rows = [("optimizer steps", show_count(train.num_steps) if train.num_steps else "unknown without data")]
    packs = " packs" if train.packing else ""
    cost_rows.append(("batch", f"{train.batch_size}{packs} in micro-batches of {train.micro_batch}"))
    cost_rows.append(("gradient checkpointing", train.gradient_checkpointing))
    if batch is not None:
        cost_rows.append(
            ("longest batch", f"{batch.num_rows}{packs or ' rows'} of {show_count(batch.num_tokens)} tokens")
        )
    cost_rows.append(("work per step", f"{cost.flops_per_step / 1e12:.2f} TFLOP"))
    if cost.tokens_per_second and cost.seconds:
        cost_rows.append(("speed", f"{cost.tokens_per_second:,.3g} tokens/s, as measured on this device"))
        cost_rows.append(("time", show_seconds(cost.seconds)))
    else:
        cost_rows.append(("time", "unknown: no run of this kind was measured on this device yet"))
    if cost.price is not None:
        cost_rows.append(("price", f"{cost.price:.2f}"))
    cost_rows.append(
        ("disk", f"{show_bytes(cost.checkpoint_bytes)} of checkpoints, {show_bytes(cost.result_bytes)} of result")
    )
    if cost.download_bytes:
        cost_rows.append(("download", f"about {show_bytes(cost.download_bytes)}, unless it is here already"))
    if cost.tokens_per_trainable is not None and cost.share_of_optimal is not None:
        text = f"{cost.tokens_per_trainable:.2g} tokens per trained parameter"
        cost_rows.append(("data", f"{text}; {show_percent(cost.share_of_optimal)} of the compute-optimal number"))
    for name, value in cost_rows:
        work.add_row(*escape_cells((name, value)))
    console.print()
    console.print(work)
    for decision in report.plan.decisions:
        if decision.key.startswith("advice."):
            text = f"{decision.key.removeprefix('advice.')}: {decision.value}: {decision.reason}"
            console.print(f"advice on {text}", highlight=False, markup=False, soft_wrap=True)
        elif decision.key.startswith(WARNING):
            text = f"{decision.key.removeprefix(WARNING)} {decision.value}: {decision.reason}"
            console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)
    for text in report.assumptions:
        console.print(f"assumed: {text}", highlight=False, markup=False, soft_wrap=True)
