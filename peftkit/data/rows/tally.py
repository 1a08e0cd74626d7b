"""What was noticed in rows, counted by check, with the first few rows of each by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN = 20  # rows that a check names


@dataclass
class Noticed:
    """Rows that one check found. `rows` are the first few: (where, what)."""

    count: int = 0
    rows: list[tuple[str, str]] = field(default_factory=list)


class Tally:
    """Counts by name of check. Grows while rows pass by; `to_json` keeps it with them."""

    def __init__(self, found: Mapping[str, Noticed] | None = None) -> None:
        self._found = dict(found or {})

    def add(self, check: str, where: str, what: str) -> None:
        """One row that `check` found."""
        noticed = self._found.setdefault(check, Noticed())
        noticed.count += 1
        if len(noticed.rows) < SHOWN:
            noticed.rows.append((where, what))

    def of(self, check: str) -> Noticed:
        """What a check found; nothing where it found nothing."""
        return self._found.get(check, Noticed())

    def joined(self, other: Tally) -> Tally:
        """Both together; where both know a check, its rows follow each other."""
        made = Tally({name: Noticed(n.count, list(n.rows)) for name, n in self._found.items()})
        for name, noticed in other._found.items():
            mine = made._found.setdefault(name, Noticed())
            mine.count += noticed.count
            mine.rows = [*mine.rows, *noticed.rows][:SHOWN]
        return made

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: [noticed.count, noticed.rows] for name, noticed in self._found.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tally:
        """What `to_json` gave."""
        return cls({name: Noticed(n, [(w, t) for w, t in rows]) for name, (n, rows) in value.items()})
