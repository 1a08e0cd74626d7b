"""One source of any kind, as rows or as a digest of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from peftkit.data.read.hub import hub_key, hub_rows
from peftkit.data.read.locate import local_files, rows_of_file
from peftkit.data.read.remote import remote_files
from peftkit.data.read.rows import MAX_PROBLEMS, Fault, File, Row
from peftkit.data.read.streams import reading
from peftkit.errors import Problem, UserError
from peftkit.recipe.paths import is_data_path, is_url, shown
from peftkit.recipe.schema import Source
from peftkit.rundir import sha256_of


def _files(source: Source, where: str) -> list[File] | None:
    """The files behind a source, in order; None of a hub dataset."""
    if is_url(source.path):
        return remote_files(source.path, where)
    if is_data_path(source.path, Path()):
        return local_files(source.path, source.split, where)
    return None


class Located:
    """A source that was found: hashed and read from the same files.

    Raises UserError at once where it cannot be had; `where` names the recipe's key.
    """

    def __init__(self, source: Source, *, where: str) -> None:
        self.source, self.where = source, where
        self._files = _files(source, where)
        self._stamps = self._looks()

    def _looks(self) -> list[tuple[int, int]]:
        stats = [file.path.stat() for file in self._files or () if file.path.exists()]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def key(self) -> str:
        """A sha256 over all that it holds, file by file in order, with the files' names."""
        if self._files is None:
            return hub_key(self.source, self.where)
        digest = hashlib.sha256()
        for file in self._files:
            with reading(file):
                digest.update(file.name.encode() + b"\0" + bytes.fromhex(sha256_of(file.path)))
        return digest.hexdigest()

    def rows(self) -> Iterator[Row | Fault]:
        """Its rows in order, each as it is asked for; a fault in place of a row that is none.

        Raises UserError where a file cannot be read on, changed meanwhile, or has neither row nor fault.
        """
        found = hub_rows(self.source, self.where) if self._files is None else _rows(self._files)
        yield from _any(found, shown(self.source.path))
        if self._looks() != self._stamps:
            got = "files that changed while they were read"
            raise UserError(Problem(shown(self.source.path), got, "files that rest", "run it again"))


def read(source: Source, *, where: str) -> Iterator[Row | Fault]:
    """The rows of a source in order: see `Located.rows`. Raises UserError where it cannot be had."""
    return Located(source, where=where).rows()


def _rows(files: Sequence[File]) -> Iterator[Row | Fault]:
    for file in files:
        yield from rows_of_file(file)


def _any(found: Iterator[Row | Fault], name: str) -> Iterator[Row | Fault]:
    empty = True
    for row in found:
        empty = False
        yield row
    if empty:
        raise UserError(Problem(name, "no rows", "at least one row"))


def content_key(source: Source, *, where: str) -> str:
    """A sha256 over all that a source holds. Raises UserError where it cannot be had."""
    return Located(source, where=where).key()


def read_rows(sources: Sequence[str], *, where: str, split: str = "train") -> list[Row]:
    """All rows of files and hub datasets, in order.

    Raises UserError (file, line, what is wrong) for what is missing, malformed or empty, all at once.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    num_faults, last = 0, ""
    for path in sources:
        try:
            for found in read(Source(path=path, split=split), where=where):
                if isinstance(found, Row):
                    rows.append(found)
                    continue
                num_faults, last = num_faults + 1, shown(path)
                if num_faults <= MAX_PROBLEMS:
                    problems.append(found.problem)
        except UserError as error:
            problems.extend(error.problems)
    if num_faults > MAX_PROBLEMS:
        more = f"{num_faults - MAX_PROBLEMS} more malformed lines"
        problems.append(Problem(last, more, "rows that can be read"))
    if problems:
        raise UserError(problems)
    return rows
