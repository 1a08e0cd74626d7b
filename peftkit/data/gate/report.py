"""The report of `peftkit check`: totals, lengths, samples and findings as one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from peftkit.data.gate.finding import DataFinding
from peftkit.data.gate.samples import Sample
from peftkit.errors import Problem
from peftkit.units import html_table, show_count, show_percent, show_seconds

_BINS = 10


@dataclass(frozen=True)
class Totals:
    """Counts over the rows that are used. Seconds are None if no speed was measured on this device."""

    format: str
    num_train: int
    num_eval: int
    num_tokens: int
    num_learnt: int
    longest: int
    median: int
    batching: str  # how rows are put together, and what padding is left
    num_steps: int | None
    tokens_per_second: float | None
    seconds: float | None


@dataclass(frozen=True)
class DataReport:
    """Totals, a histogram of lengths in tokens (upper end, rows), samples, and the finding of every check."""

    totals: Totals
    histogram: tuple[tuple[int, int], ...]
    decisions: tuple[tuple[str, str, str], ...]  # key, value, reason
    samples: tuple[Sample, ...]
    findings: tuple[DataFinding, ...]
    sampled: str  # what the searches for near duplicates looked at

    @property
    def failed(self) -> tuple[DataFinding, ...]:
        """Return the findings that stop a run."""
        return tuple(finding for finding in self.findings if finding.status == "fail")

    @property
    def verdict(self) -> str:
        """Return one line: how many checks pass, warn, fail and are waived."""
        names = ("pass", "warn", "fail", "waived", "n/a")
        counts = {name: sum(f.status == name for f in self.findings) for name in names}
        parts = [f"{count} {name}" for name, count in counts.items() if count or name == "fail"]
        return f"{len(self.findings)} checks: {', '.join(parts)}"

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) rows for a table of the totals."""
        totals = self.totals
        loss_share = show_percent(totals.num_learnt / max(1, totals.num_tokens))
        found = [
            ("format", totals.format),
            ("rows", f"{show_count(totals.num_train)} to train on, {show_count(totals.num_eval)} held out"),
            ("tokens", f"{show_count(totals.num_tokens)}, {show_count(totals.num_learnt)} in the loss ({loss_share})"),
            ("lengths", f"median {show_count(totals.median)}, longest {show_count(totals.longest)} tokens"),
            ("batches", totals.batching),
        ]
        if totals.num_steps:
            found.append(("steps", show_count(totals.num_steps)))
        if totals.seconds is not None and totals.tokens_per_second is not None:
            speed = f"{totals.tokens_per_second:,.0f} tokens/s as measured in earlier runs"
            found.append(("time", f"about {show_seconds(totals.seconds)} at {speed}"))
        return found

    def problems(self) -> list[Problem]:
        """Return the failed checks as problems to fix: one each, its first rows named."""
        problems = []
        for finding in self.failed:
            waive = f"or waive it: data.waive: [{finding.check}]"
            fix = f"{finding.fix}; {waive}" if finding.fix else waive
            rows = "; ".join(f"{where}: {what}" for where, what in finding.rows[:3])
            got = f"{finding.said} ({rows})" if rows else finding.said
            problems.append(Problem(f"data check {finding.check}", got, "data that passes", fix))
        return problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self) | {"verdict": self.verdict}

    def _repr_html_(self) -> str:
        marks = [(f.status, f.check, f.said) for f in self.findings if f.status not in {"pass", "n/a"}]
        return f"{html_table(self.rows())}<p>{escape(self.verdict)}</p>{html_table(marks)}"


def histogram(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return (upper end in tokens, rows) of at most _BINS bins of equal width."""
    if not len(lengths):
        return ()
    longest = max(lengths)
    width = max(1, -(-longest // _BINS))
    counts = [0] * (-(-longest // width))
    for length in lengths:
        counts[(max(1, length) - 1) // width] += 1
    return tuple(((number + 1) * width, count) for number, count in enumerate(counts))
