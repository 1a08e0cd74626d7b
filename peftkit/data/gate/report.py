"""What `peftkit check` tells of a recipe's data, as one value: totals, lengths, samples, findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from peftkit.data.gate.finding import Finding
from peftkit.data.gate.samples import Sample
from peftkit.errors import Problem
from peftkit.units import html_table, show_count, show_percent, show_seconds

_BINS = 10


@dataclass(frozen=True)
class Totals:
    """Counts over the rows that are used. Seconds are None where no speed was measured on this device."""

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
    """Totals, a histogram of lengths in tokens (upper end, rows), samples, and what every check says."""

    totals: Totals
    histogram: tuple[tuple[int, int], ...]
    decisions: tuple[tuple[str, str, str], ...]  # key, value, reason
    samples: tuple[Sample, ...]
    findings: tuple[Finding, ...]
    sampled: str  # what the searches for near duplicates looked at

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Checks that stop a run."""
        return tuple(finding for finding in self.findings if finding.status == "fail")

    @property
    def verdict(self) -> str:
        """One line: how many checks pass, warn, fail, and are waived."""
        names = ("pass", "warn", "fail", "waived")
        counts = {name: sum(f.status == name for f in self.findings) for name in names}
        told = [f"{count} {name}" for name, count in counts.items() if count or name == "fail"]
        return f"{len(self.findings)} checks: {', '.join(told)}"

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table of totals."""
        t = self.totals
        learnt = show_percent(t.num_learnt / max(1, t.num_tokens))
        found = [
            ("format", t.format),
            ("rows", f"{show_count(t.num_train)} to train on, {show_count(t.num_eval)} held out"),
            ("tokens", f"{show_count(t.num_tokens)}, {show_count(t.num_learnt)} learnt ({learnt})"),
            ("lengths", f"median {show_count(t.median)}, longest {show_count(t.longest)} tokens"),
            ("batches", t.batching),
        ]
        if t.num_steps:
            found.append(("steps", show_count(t.num_steps)))
        if t.seconds is not None and t.tokens_per_second is not None:
            speed = f"{t.tokens_per_second:,.0f} tokens/s as measured in earlier runs"
            found.append(("time", f"about {show_seconds(t.seconds)} at {speed}"))
        return found

    def problems(self) -> list[Problem]:
        """The failed checks as problems to mend: one each, its first rows named."""
        return [problem for finding in self.failed for problem in _problems(finding)]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"verdict": self.verdict}

    def _repr_html_(self) -> str:
        marks = [(f.status, f.check, f.said) for f in self.findings if f.status != "pass"]
        return f"{html_table(self.rows())}<p>{escape(self.verdict)}</p>{html_table(marks)}"


def _problems(finding: Finding) -> list[Problem]:
    waive = f"or waive it: data.waive: [{finding.check}]"
    fix = f"{finding.fix}; {waive}" if finding.fix else waive
    rows = "; ".join(f"{where}: {what}" for where, what in finding.rows[:3])
    got = f"{finding.said} ({rows})" if rows else finding.said
    return [Problem(f"data check {finding.check}", got, "data that passes", fix)]


def histogram(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(upper end in tokens, rows) of bins of equal width."""
    if not len(lengths):
        return ()
    top = max(lengths)
    width = max(1, -(-top // _BINS))
    counts = [0] * (-(-top // width))
    for length in lengths:
        counts[(max(1, length) - 1) // width] += 1
    return tuple(((place + 1) * width, count) for place, count in enumerate(counts))
