"""Counts of rows by check, with the first few rows of each by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_NAMED_ROWS = 20  # rows that a check names


@dataclass
class CountedRows:
    """The rows counted by one check. `rows` are the first MAX_NAMED_ROWS of `count`: (where, what)."""

    count: int = 0
    rows: list[tuple[str, str]] = field(default_factory=list)


class Tally:
    """Counts of rows by name of check, filled while rows are read or tokenized, and stored with them."""

    def __init__(self, counts: Mapping[str, CountedRows] | None = None) -> None:
        self._counts = dict(counts or {})

    def add(self, check: str, where: str, what: str) -> None:
        """Count one row for `check`."""
        counted = self._counts.setdefault(check, CountedRows())
        counted.count += 1
        if len(counted.rows) < MAX_NAMED_ROWS:
            counted.rows.append((where, what))

    def of(self, check: str) -> CountedRows:
        """Return the rows counted by a check; empty if there are none."""
        return self._counts.get(check, CountedRows())

    def joined(self, other: Tally) -> Tally:
        """Return the sum of both tallies; for a check in both, the rows of `other` come last."""
        merged = Tally({name: CountedRows(n.count, list(n.rows)) for name, n in self._counts.items()})
        for name, counted in other._counts.items():
            target = merged._counts.setdefault(name, CountedRows())
            target.count += counted.count
            target.rows = [*target.rows, *counted.rows][:MAX_NAMED_ROWS]
        return merged

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: {check: [count, rows]}."""
        return {name: [counted.count, counted.rows] for name, counted in self._counts.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tally:
        """Restore a tally from what `to_json` returned."""
        return cls({name: CountedRows(n, [(w, t) for w, t in rows]) for name, (n, rows) in value.items()})
