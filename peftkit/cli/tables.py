"""Tables on stdout: the plan's decisions and a run's summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftkit.api import Account, Evaluation, Inspection
from peftkit.diagnose.verdict import Verdict
from peftkit.plan import Plan
from peftkit.prepare.measured_memory import Trial
from peftkit.report import Summary
from peftkit.run.reproduce import Reproduction
from peftkit.run.verify import Verification
from peftkit.units import show_bytes, show_count, show_percent, show_seconds


def _console(width: int = 180) -> Console:
    """As wide as the terminal; wide enough for whole rows where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def _plain(cells: Iterable[str]) -> list[str]:
    """Texts with square brackets as they are: rich would take them for markup."""
    return [escape(cell) for cell in cells]


def _table(*headings: str) -> Table:
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def print_rows(rows: Iterable[Sequence[str]], *, headed: bool = False) -> None:
    """Rows of texts in columns; with `headed` the first is a heading."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for number, row in enumerate(rows):
        table.add_row(*_plain(row), style="bold" if headed and number == 0 else None)
    _console().print(table, highlight=False)


def print_plan(plan: Plan) -> None:
    """Every decided value, where it came from and why."""
    console = _console()
    table = _table("key", "value", "from", "because")
    for decision in sorted(plan.decisions, key=lambda d: d.key):
        value = (
            ", ".join(map(str, decision.value)) if isinstance(decision.value, list) else str(decision.value)
        )
        table.add_row(*_plain((decision.key, value, decision.source, decision.reason)))
    console.print(table)
    method = plan.method
    if method.trainable_by_role and method.num_trainable and method.num_parameters:
        added = method.num_trainable if method.peft else 0
        console.print()
        console.print(
            _parameters(method.trainable_by_role, method.num_trainable, method.num_parameters + added)
        )


def print_account(found: Account) -> None:
    """Parameters, memory at the peak by component, fit, nearest changes, time and what was assumed."""
    console = _console()
    plan, memory = found.plan, found.memory
    total = found.num_total
    console.print(_parameters(plan.method.trainable_by_role or {}, plan.method.num_trainable or 0, total))
    layers = ", ".join(f"{place}: {show_count(n)}" for place, n in plan.method.trainable_by_layers.items())
    console.print(f"by layers: {layers}\n", highlight=False, soft_wrap=True)
    table = _table("memory at the peak", "", "", "because of")
    table.columns[1].justify = "right"
    for row in found.memory_rows():
        table.add_row(*row)
    console.print(table)
    peaks = ", ".join(f"{peak.phase} {show_bytes(peak.allocated_bytes)}" for peak in memory.peaks)
    console.print(f"\npeaks: {peaks}", highlight=False, soft_wrap=True)
    console.print(f"driven by {found.driver}", highlight=False, soft_wrap=True)
    console.print(found.verdict, style="bold", highlight=False)
    if found.trial is not None:
        console.print(_trial_line(found.trial), highlight=False, soft_wrap=True)
    if found.changes:
        changes = _table("what fits", "needs", "", "costs")
        for change in found.changes:
            row = (" ".join(change.overrides), show_bytes(change.needed_bytes), change.verdict, change.cost)
            changes.add_row(*_plain(row))
        console.print(changes)
    work = _table("", "")
    work.show_header = False
    for name, value in _work_rows(found):
        work.add_row(*_plain((name, value)))
    console.print()
    console.print(work)
    _print_notes(console, found)


def _print_notes(console: Console, found: Account) -> None:
    for decision in found.plan.decisions:
        if decision.key.startswith("advice."):
            text = f"{decision.key.removeprefix('advice.')}: {decision.value}: {decision.reason}"
            console.print(f"advice on {text}", highlight=False, markup=False, soft_wrap=True)
    for text in found.assumed:
        console.print(f"assumed: {text}", highlight=False, markup=False, soft_wrap=True)


def _trial_line(trial: Trial) -> str:
    said, was = show_bytes(trial.predicted_bytes), show_bytes(trial.measured_bytes)
    line = f"measured in {trial.num_steps} steps on random weights: {was} allocated, {said} predicted"
    line += f" ({trial.error_percent:+.1f} %)"
    if trial.measured_reserved_bytes and trial.predicted_reserved_bytes:
        said, was = show_bytes(trial.predicted_reserved_bytes), show_bytes(trial.measured_reserved_bytes)
        line += f"; {was} reserved, {said} predicted ({trial.reserved_error_percent:+.1f} %)"
    return f"{line}; {show_seconds(trial.step_seconds)} a step"


def _work_rows(found: Account) -> list[tuple[str, str]]:
    """Steps, pieces, speed, time, price, disk, data."""
    plan, work = found.plan, found.work
    train, batch = plan.train, plan.batch
    rows = [("optimizer steps", show_count(train.num_steps) if train.num_steps else "unknown without data")]
    packs = " packs" if train.packing else ""
    rows.append(("batch", f"{train.batch_size}{packs} in passes of {train.micro_batch}"))
    rows.append(("gradient checkpointing", train.gradient_checkpointing))
    if batch is not None:
        rows.append(
            ("longest batch", f"{batch.num_rows}{packs or ' rows'} of {show_count(batch.num_tokens)} tokens")
        )
    rows.append(("work per step", f"{work.flops_per_step / 1e12:.2f} teraflops"))
    if work.tokens_per_second and work.seconds:
        rows.append(("speed", f"{work.tokens_per_second:,.3g} tokens/s, as measured on this device"))
        rows.append(("time", show_seconds(work.seconds)))
    else:
        rows.append(("time", "unknown: no run of this kind was measured on this device yet"))
    if work.price is not None:
        rows.append(("price", f"{work.price:.2f}"))
    rows.append(
        (
            "disk",
            f"{show_bytes(work.checkpoint_bytes)} of checkpoints, {show_bytes(work.result_bytes)} of result",
        )
    )
    if work.download_bytes:
        rows.append(("download", f"about {show_bytes(work.download_bytes)}, unless it is here already"))
    if work.tokens_per_trainable is not None and work.share_of_optimal is not None:
        text = f"{work.tokens_per_trainable:.2g} tokens per trained parameter"
        rows.append(("data", f"{text}; {show_percent(work.share_of_optimal)} of the compute-optimal number"))
    return rows


def _parameters(by_role: Mapping[str, int], num_trainable: int, num_total: int) -> Table:
    table = _table("trainable", "parameters")
    table.columns[1].justify = "right"
    for role, count in by_role.items():
        table.add_row(role, show_count(count))
    share = show_percent(num_trainable / max(1, num_total))
    table.add_row("in all", f"{show_count(num_trainable)} of {show_count(num_total)} ({share})")
    return table


def print_inspection(found: Inspection) -> None:
    """A model in numbers, the methods that can train it, and what to mind."""
    console = _console(width=110)
    table = _table("", "")
    table.show_header = False
    for name, value in found.rows():
        table.add_row(*_plain((name, value)))
    console.print(found.id, style="bold", highlight=False)
    console.print(table)
    methods = _table("method", "trained at its defaults", "")
    for row in found.method_rows():
        methods.add_row(*_plain(row))
    console.print()
    console.print(methods)
    if found.mind:
        console.print("\nto mind")
        for text in found.mind:
            console.print(f"  {text}", highlight=False, markup=False)


def print_evaluation(found: Evaluation) -> None:
    """Loss and metrics, and the loss by position where it was asked for."""
    console = _console()
    table = _table("", "")
    table.show_header = False
    for name, value in found.rows():
        table.add_row(*_plain((name, value)))
    if found.rows():
        console.print(table)
    lines = found.context_rows()
    if lines:
        contexts = _table(*lines[0])
        for line in lines[1:]:
            contexts.add_row(*_plain(line))
        console.print("loss by position, in nats per token", highlight=False)
        console.print(contexts)


def print_verification(found: Verification) -> None:
    """What is whole and what is not, and where a resume would go on."""
    console = _console()
    table = _table("file", "size", "is")
    for row in found.rows():
        table.add_row(*_plain(row))
    console.print(table)
    count = len(found.faults)
    end = "finished" if found.is_finished else f"a resume goes on from step {found.newest_step}"
    console.print(f"{count or 'no'} fault{'' if count == 1 else 's'}; {end}")


def print_reproduction(found: Reproduction) -> None:
    """How a run compares with itself, made again."""
    table = _table("", "")
    table.show_header = False
    for row in found.rows():
        table.add_row(*_plain(row))
    _console().print(table)


def print_verdict(verdict: Verdict) -> None:
    """Is quality lagging, why, and what to do."""
    table = _table("", "")
    table.show_header = False
    for name, value in verdict.rows():
        table.add_row(*_plain((name, value)))
    _console().print(table)


def print_summary(summary: Summary) -> None:
    """What was trained, what it took, what it brought, and what to do next."""
    console = _console()
    table = _table("", "")
    table.show_header = False
    for name, value in summary.rows():
        table.add_row(*_plain((name, value)))
    console.print(_parameters(summary.trainable_by_role, summary.num_trainable, summary.num_total))
    console.print()
    console.print(table)
    console.print("\nnext")
    for command in summary.next_commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)
