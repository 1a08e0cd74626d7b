"""What merging and exporting show: a bar in bytes on stderr, and tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from peftkit.api import Exported, MergeReport
from peftkit.cli.display import quiet_loggers
from peftkit.cli.tables import print_rows
from peftkit.secrets import redact
from peftkit.units import printable, show_bytes

_PLAIN_SECONDS = 5.0
Show = Callable[[dict[str, Any]], None]


def _line(event: dict[str, Any]) -> str:
    text = event["text"] if event["event"] == "notice" else f"{event['name']}: {event['detail']}"
    return printable(redact(text))


@contextmanager
def open_bytes_display() -> Iterator[Show]:
    """Shows events: on a terminal with a bar of bytes, elsewhere a line every few seconds."""
    quiet_loggers()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_display()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("writing", total=None, visible=False)

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "progress":
                done, total = event["done_bytes"], event["total_bytes"]
                progress.update(task, completed=done, total=total, visible=done < total)
            else:
                progress.console.print(_line(event), highlight=False, markup=False)

        yield show


def _plain_display() -> Show:
    last = time.monotonic()

    def show(event: dict[str, Any]) -> None:
        nonlocal last
        if event["event"] != "progress":
            print(_line(event), file=sys.stderr, flush=True)
        elif time.monotonic() - last >= _PLAIN_SECONDS:
            last = time.monotonic()
            done, total = show_bytes(event["done_bytes"]), show_bytes(event["total_bytes"])
            print(f"written {done} of {total}", file=sys.stderr, flush=True)

    return show


def print_export(found: Exported) -> None:
    """What was written, and what to know of it."""
    print_rows(found.rows())
    for text in found.said:
        print(printable(text))
    print(f"\n{found.where}")


def print_merge(report: MergeReport) -> None:
    """The outcome of a merge, and what the other base would give."""
    print_rows(report.rows())
    if report.choices:
        print()
        print_rows(report.choice_rows(), headed=True)
    if report.gain is not None and report.recommended != report.base:
        better = f"{report.recommended} is better by {report.gain} nats per token on held-out rows"
        print(f"\n{better}: peftkit merge ... --base {report.recommended}")
    print(f"\n{report.out}")
