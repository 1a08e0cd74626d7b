"""The data gate on a terminal: samples with every token coloured, lengths, totals, and what checks say."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftkit.api import DataReport
from peftkit.data.gate.finding import Finding
from peftkit.data.gate.samples import Sample
from peftkit.units import printable

_STYLES = {
    "masked": "dim",
    "learnt": "bold green",
    "special": "cyan",
    "learnt special": "bold black on green",
}
_MARKS = {"pass": "green", "warn": "yellow", "fail": "bold red", "waived": "magenta"}
_LONGEST = 1_500  # characters of a sample
_BAR = 40
_ROWS = 5


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _sample(sample: Sample, *, coloured: bool) -> Text:
    """A row with its tokens in colour; without colours, what is learnt stands between signs."""
    text = Text()
    learning = False
    for piece in sample.pieces:
        is_learnt = piece.kind.startswith("learnt")
        if not coloured and is_learnt != learning:
            text.append("⟦" if is_learnt else "⟧")
        learning = is_learnt
        text.append(printable(piece.text), style=_STYLES[piece.kind])
        if len(text) > _LONGEST:
            text.append(" ...", style="dim")
            break
    if not coloured and learning:
        text.append("⟧")
    return text


def _legend(*, coloured: bool) -> Text:
    if not coloured:
        return Text("⟦ ⟧ learnt; the rest is masked")
    return Text.assemble(
        ("masked", _STYLES["masked"]),
        "  ",
        ("learnt", _STYLES["learnt"]),
        "  ",
        ("special", _STYLES["special"]),
        "  ",
        ("learnt special", _STYLES["learnt special"]),
    )


def print_data_report(report: DataReport) -> None:
    """Samples, decisions, lengths, totals, then every check with the rows that it found."""
    console = _console()
    coloured = console.is_terminal
    console.print(_legend(coloured=coloured))
    for sample in report.samples:
        where = printable(sample.where.replace(f"{Path.cwd()}/", ""))
        console.print(Text(f"\n{sample.set}: {where}", style="bold"))
        console.print(_sample(sample, coloured=coloured))
    console.print()
    most = max((count for _, count in report.histogram), default=1)
    for upper, count in report.histogram:
        bar = "█" * round(_BAR * count / most)
        console.print(f"{upper:>8,} tokens  {bar} {count:,}", highlight=False)
    console.print()
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in report.rows():
        table.add_row(Text(name, style="bold"), Text(value))
    for key, value, reason in report.decisions:
        table.add_row(Text(key, style="bold"), Text(printable(f"{value}: {reason}")))
    console.print(table)
    console.print()
    for finding in report.findings:
        _print_finding(console, finding)
    sampled = f" (near duplicates: {report.sampled})"
    console.print(Text(report.verdict, style="bold"), Text(sampled, style="dim"))


def _print_finding(console: Console, finding: Finding) -> None:
    mark = (f"{finding.status:<6} ", _MARKS[finding.status])
    console.print(Text.assemble(mark, f"{finding.check:<22} {printable(finding.said)}"))
    if finding.status == "pass":
        return
    here = f"{Path.cwd()}/"
    for where, what in finding.rows[:_ROWS]:
        console.print(Text(printable(f"         {where}: {what}".replace(here, "")), style="dim"))
    if finding.num_rows > _ROWS and finding.rows:
        console.print(Text(f"         and {finding.num_rows - _ROWS:,} more", style="dim"))
    if finding.fix:
        console.print(Text(f"         fix: {finding.fix}"))
