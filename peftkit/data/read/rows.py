"""The results of reading: rows, and faults in place of rows that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import Problem, UserError

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Row:
    """One row as it was read. `where` is 'file:line', or 'name row N' for files without lines."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Fault:
    """One row that could not be read; it is counted, and reading continues after it."""

    kind: Literal["malformed-rows", "encoding"]
    problem: Problem


@dataclass(frozen=True)
class File:
    """A file to read. `name` is what rows and errors call it: its path, or the URL it was fetched from.

    `encoding` is that of a text file, where the recipe names one; else UTF-8.
    """

    path: Path
    name: str
    encoding: str | None = None

    def refuse(self, got: str, expected: str, fix: str = "", *, line: int | None = None) -> UserError:
        """Return the error of a file that cannot be read at all."""
        where = self.name if line is None else f"{self.name}:{line}"
        return UserError(Problem(where, got, expected, fix))


def first_duplicate(names: Iterable[str]) -> str | None:
    """Return the first name that occurs twice; None if all are distinct."""
    earlier: set[str] = set()
    for name in names:
        if name in earlier:
            return name
        earlier.add(name)
    return None


def malformed_fault(where: str, got: str, expected: str, fix: str = "") -> Fault:
    """Return the fault of a row that has the wrong form."""
    return Fault("malformed-rows", Problem(where, got, expected, fix))


def encoding_fault(where: str, got: str, fix: str = "convert the file to UTF-8") -> Fault:
    """Return the fault of a row whose text is not valid UTF-8."""
    return Fault("encoding", Problem(where, got, "UTF-8 text", fix))
