"""One data source of any kind: its rows, or a digest of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from peftkit.data.read.hub import hub_key, hub_rows
from peftkit.data.read.locate import local_files, rows_of_file
from peftkit.data.read.remote import remote_files
from peftkit.data.read.rows import MAX_PROBLEMS, Fault, File, Row
from peftkit.data.read.streams import split_suffixes, translate_read_errors
from peftkit.errors import Problem, UserError
from peftkit.recipe.paths import is_data_path, is_url, redact_url
from peftkit.recipe.schema import Source
from peftkit.rundir import sha256_of


class LocatedSource:
    """A source whose files are known: hashed and read from the same files.

    Raises UserError at once if it is not available; `where` names the recipe's key.
    """

    def __init__(self, source: Source, *, where: str) -> None:
        self.source, self.where = source, where
        self._files: list[File] | None = None  # None: a data set of the hub
        if is_url(source.path):
            self._files = remote_files(source.path, where)
        elif is_data_path(source.path, Path()):
            self._files = local_files(source.path, source.split, where)
        if source.encoding is not None:
            unread = [file for file in self._files or () if split_suffixes(file.path)[0] in {".parquet", ".arrow"}]
            if unread or self._files is None:
                got, expected = f"encoding {source.encoding} for {source.path}", "an encoding of text files"
                raise UserError(Problem(where, got, expected, "leave it out: the format has its own"))
            self._files = [replace(file, encoding=source.encoding) for file in self._files]
        self._stamps = self._file_stamps()

    def _file_stamps(self) -> list[tuple[int, int]]:
        stats = [file.path.stat() for file in self._files or () if file.path.exists()]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def key(self) -> str:
        """Return a sha256 over all its content, file by file in order, with the files' names."""
        if self._files is None:
            return hub_key(self.source, self.where)
        digest = hashlib.sha256((self.source.encoding or "").encode())
        for file in self._files:
            with translate_read_errors(file):
                digest.update(file.name.encode() + b"\0" + bytes.fromhex(sha256_of(file.path)))
        return digest.hexdigest()

    def rows(self) -> Iterator[Row | Fault]:
        """Yield its rows in order, each read on demand; a fault stands in for a row that cannot be read.

        Raises UserError if a file cannot be read to its end, changed meanwhile, or has neither row nor fault.
        """
        if self._files is None:
            rows = hub_rows(self.source, self.where)
        else:
            rows = chain.from_iterable(map(rows_of_file, self._files))
        name = redact_url(self.source.path)
        is_empty = True
        for row in rows:
            is_empty = False
            yield row
        if is_empty:
            raise UserError(Problem(name, "no rows", "at least one row"))
        if self._file_stamps() != self._stamps:
            got = "files that changed while they were read"
            raise UserError(Problem(name, got, "files that do not change", "run it again"))


def read(source: Source, *, where: str) -> Iterator[Row | Fault]:
    """Yield a source's rows in order: see `LocatedSource.rows`. Raises UserError if it is not available."""
    return LocatedSource(source, where=where).rows()


def content_key(source: Source, *, where: str) -> str:
    """Return a sha256 over all the content of a source. Raises UserError if it is not available."""
    return LocatedSource(source, where=where).key()


def read_rows(sources: Sequence[str], *, where: str, split: str = "train") -> list[Row]:
    """Return all rows of files and hub datasets, in order.

    Raises UserError (file, line, what is wrong) for everything missing, malformed or empty, all at once.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    num_faults, last_name = 0, ""
    for path in sources:
        try:
            for item in read(Source(path=path, split=split), where=where):
                if isinstance(item, Row):
                    rows.append(item)
                    continue
                num_faults, last_name = num_faults + 1, redact_url(path)
                if num_faults <= MAX_PROBLEMS:
                    problems.append(item.problem)
        except UserError as error:
            problems.extend(error.problems)
    if num_faults > MAX_PROBLEMS:
        message = f"{num_faults - MAX_PROBLEMS} more malformed lines"
        problems.append(Problem(last_name, message, "rows that can be read"))
    if problems:
        raise UserError(problems)
    return rows
