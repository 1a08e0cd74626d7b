"""What a check says: pass, warn or fail, the rows that it is about, and how to mend them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftkit.data.rows.examples import Examples
from peftkit.data.rows.tally import Noticed, Tally
from peftkit.data.tokens.prepare import Prepared
from peftkit.plan.facts import Facts
from peftkit.plan.plan import Plan

Status = Literal["pass", "warn", "fail", "waived"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `rows` are the first few of `num_rows`: (where, what)."""

    check: str
    status: Status
    said: str
    num_rows: int = 0
    rows: tuple[tuple[str, str], ...] = ()
    fix: str = ""


@dataclass(frozen=True)
class Data:
    """What checks look at; with `full` every row is searched for near duplicates."""

    examples: Examples
    prepared: Prepared
    plan: Plan
    tokenizer: Any
    facts: Facts
    stops: frozenset[int]
    full: bool

    @property
    def tally(self) -> Tally:
        """What was noticed in reading and in tokenizing."""
        return self.examples.tally.joined(self.prepared.seen.tally)

    @property
    def num_rows(self) -> int:
        """Rows that were read and could be used."""
        return len(self.examples.train) + len(self.examples.eval)


def of_rows(check: str, status: Status, noticed: Noticed, said: str, fix: str) -> Finding:
    """A finding about the rows that were noticed."""
    return Finding(check, status, said, noticed.count, tuple(noticed.rows), fix)


def of_pairs(
    check: str, status: Status, rows: Sequence[tuple[str, str]], said: str, fix: str, *, shown: int = 20
) -> Finding:
    """A finding about rows that were gathered in a list."""
    return Finding(check, status, said, len(rows), tuple(rows[:shown]), fix)


def share(part: int, whole: int) -> str:
    """'3 of 200 (1.5 %)'."""
    percent = 100 * part / max(1, whole)
    return f"{part:,} of {whole:,} ({percent:.{2 if percent < 10 else 3}g} %)"
