"""The data report on a terminal: samples with every token coloured, lengths, totals and results of checks."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from peftkit.api import DataReport
from peftkit.cli.tables import console_of
from peftkit.units import printable

_TOKEN_STYLES = {"masked": "dim", "learnt": "bold green", "special": "cyan", "learnt special": "bold black on green"}
_STATUS_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "waived": "magenta", "n/a": "dim"}
_MAX_CHARACTERS = 1_500  # characters of a sample
_BAR_WIDTH = 40
_MAX_ROWS = 5


def print_data_report(report: DataReport) -> None:
    """Print samples, decisions, lengths, totals, then every check with its rows."""
    console = console_of(width=160)
    coloured = console.color_system is not None and not console.no_color
    if not coloured:
        legend = Text("⟦ ⟧ in the loss; the rest is masked")
    else:
        legend = Text.assemble(
            ("masked", _TOKEN_STYLES["masked"]),
            "  ",
            ("in the loss", _TOKEN_STYLES["learnt"]),
            "  ",
            ("special", _TOKEN_STYLES["special"]),
            "  ",
            ("special, in the loss", _TOKEN_STYLES["learnt special"]),
        )
    console.print(legend)
    for sample in report.samples:
        where = printable(sample.where.replace(f"{Path.cwd()}/", ""))
        console.print(Text(f"\n{sample.set}: {where}", style="bold"))
        text = Text()  # without colours, trained tokens stand between ⟦ and ⟧
        previous_trained = False
        for piece in sample.pieces:
            trained = piece.kind.startswith("learnt")
            if not coloured and trained != previous_trained:
                text.append("⟦" if trained else "⟧")
            previous_trained = trained
            text.append(printable(piece.text), style=_TOKEN_STYLES[piece.kind])
            if len(text) > _MAX_CHARACTERS:
                text.append(" ...", style="dim")
                break
        if not coloured and previous_trained:
            text.append("⟧")
        console.print(text)
    console.print()
    max_count = max((count for _, count in report.histogram), default=1)
    for upper, count in report.histogram:
        bar = "█" * round(_BAR_WIDTH * count / max_count)
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
        status_text = (f"{finding.status:<6} ", _STATUS_STYLES[finding.status])
        console.print(Text.assemble(status_text, f"{finding.check:<22} {printable(finding.said)}"))
        if finding.status not in {"pass", "n/a"}:
            folder_prefix = f"{Path.cwd()}/"
            for row_place, what in finding.rows[:_MAX_ROWS]:
                console.print(Text(printable(f"         {row_place}: {what}".replace(folder_prefix, "")), style="dim"))
            if finding.num_rows > _MAX_ROWS and finding.rows:
                console.print(Text(f"         and {finding.num_rows - _MAX_ROWS:,} more", style="dim"))
            if finding.fix:
                console.print(Text(f"         fix: {finding.fix}"))
    sampling_text = f" (near duplicates: {report.sampled})"
    console.print(Text(report.verdict, style="bold"), Text(sampling_text, style="dim"))
