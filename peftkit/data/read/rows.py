"""What reading gives: rows, and faults where a row cannot be had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import Problem, UserError

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Row:
    """One row as it was read. `where` is 'file:line', or 'name row N' where lines mean nothing."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Fault:
    """One row that could not be read, to be counted: reading goes on behind it."""

    kind: Literal["malformed-rows", "encoding"]
    problem: Problem


@dataclass(frozen=True)
class File:
    """A file to read. `name` is what rows and errors call it: its path, or the URL it was fetched from."""

    path: Path
    name: str

    def refuse(self, got: str, expected: str, fix: str = "", *, line: int | None = None) -> UserError:
        """The error of a file that cannot be read at all."""
        where = self.name if line is None else f"{self.name}:{line}"
        return UserError(Problem(where, got, expected, fix))


def twice(names: Iterable[str]) -> str | None:
    """The first name that comes again; None where each comes once."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def malformed(where: str, got: str, expected: str, fix: str = "") -> Fault:
    """A row that is not what it should be."""
    return Fault("malformed-rows", Problem(where, got, expected, fix))


def misencoded(where: str, got: str, fix: str = "convert the file to UTF-8") -> Fault:
    """A row whose text is not Unicode."""
    return Fault("encoding", Problem(where, got, "UTF-8 text", fix))
