"""The outcome of a check (pass, warn, fail, waived or n/a) with its rows and fix; and the inputs of checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftkit.data.rows.examples import Examples
from peftkit.data.rows.tally import CountedRows, Tally
from peftkit.data.tokens.prepare import TokenizedData
from peftkit.plan.facts import Facts
from peftkit.plan.plan import Plan

Status = Literal["pass", "warn", "fail", "waived", "n/a"]


@dataclass(frozen=True)
class DataFinding:
    """The outcome of one check. `rows` are the first few of `num_rows`: (where, what)."""

    check: str
    status: Status
    said: str
    num_rows: int = 0
    rows: tuple[tuple[str, str], ...] = ()
    fix: str = ""


@dataclass(frozen=True)
class CheckInputs:
    """The inputs of every check; with `full`, near duplicates are searched in all rows."""

    examples: Examples
    prepared: TokenizedData
    plan: Plan
    tokenizer: Any
    facts: Facts
    stops: frozenset[int]
    full: bool

    @property
    def tally(self) -> Tally:
        """Return the rows counted by check while reading and while tokenizing."""
        return self.examples.tally.joined(self.prepared.seen.tally)

    @property
    def num_rows(self) -> int:
        """Return the number of rows that were read and could be used."""
        return len(self.examples.train) + len(self.examples.eval)


def finding_from_counts(check: str, status: Status, counted: CountedRows, message: str, fix: str) -> DataFinding:
    """Return a finding about rows that were counted while they were read or tokenized."""
    return DataFinding(check, status, message, counted.count, tuple(counted.rows), fix)


def finding_from_rows(
    check: str, status: Status, rows: Sequence[tuple[str, str]], message: str, fix: str, *, max_rows: int = 20
) -> DataFinding:
    """Return a finding about a list of (where, what) rows."""
    return DataFinding(check, status, message, len(rows), tuple(rows[:max_rows]), fix)


def show_share(part: int, total: int) -> str:
    """Return '3 of 200 (1.5 %)'."""
    percent = 100 * part / max(1, total)
    return f"{part:,} of {total:,} ({percent:.{2 if percent < 10 else 3}g} %)"
