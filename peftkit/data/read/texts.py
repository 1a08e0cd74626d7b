"""Text files: JSON lines and arrays, tables, paragraphs. All but JSON arrays are streamed."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, NoReturn

from peftkit.data.read.rows import Fault, File, Row, malformed, misencoded, twice
from peftkit.data.read.streams import MAX_LINE_BYTES, Line, decoded, lines, opened, suffixes, wide
from peftkit.errors import UserError
from peftkit.units import clipped

MAX_PACKED_ARRAY_BYTES = 512 * 2**20  # a file that is not compressed shows its size
MAX_RECORD_BYTES = 16 * 2**20  # of a table: the csv module takes four bytes and more for each
_GAP = re.compile(r"[ \t\r\n]*")


class _RefusedError(ValueError):
    """What Python's json takes and a row must not hold."""


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"the number {name}")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(clipped(text))


def _unlike_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _RefusedError(f"the key {clipped(twice(name for name, _ in pairs) or '')!r} twice")
    return value


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unlike_keys, parse_constant=_refuse_constant, parse_float=_finite
)
_LENIENT = json.JSONDecoder()


def _checked(value: Any, text: str, where: str) -> Row | Fault:
    """The row of a parsed value; a fault where it is no object or holds what UTF-8 has no bytes for."""
    if not isinstance(value, dict):
        return malformed(where, f"a {type(value).__name__}", "one JSON object")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return misencoded(where, f"half of a surrogate pair ({half})", "write the character itself")
    return Row(value, where)


def _record(text: str, where: str) -> Row | Fault:
    try:
        return _checked(_STRICT.decode(text), text, where)
    except _RefusedError as error:
        return malformed(where, str(error), "one JSON object", "JSON has no NaN, and a key once")
    except (ValueError, RecursionError) as error:
        return malformed(where, f"a line that is not JSON ({error})", "one JSON object")


def json_lines(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """One object a line."""
    with opened(file) as stream:
        if fault := wide(file, stream):
            yield fault
            return
        for line in lines(stream, file.name, limit):
            if line.fault is not None:
                yield line.fault
            elif not line.text.isspace():
                yield _record(line.text, f"{file.name}:{line.number}")


def json_array(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """A list of objects. The text is loaded whole; its rows are parsed one by one."""
    with opened(file) as stream:
        if fault := wide(file, stream):
            yield fault
            return
        packed = suffixes(file.path)[1]
        raw = stream.read(MAX_PACKED_ARRAY_BYTES + 1) if packed else stream.read()
        if packed and len(raw) > MAX_PACKED_ARRAY_BYTES:
            got = f"one JSON array that expands to more than {MAX_PACKED_ARRAY_BYTES:,} bytes"
            raise file.refuse(got, "less, or JSON lines, which are read one by one", "decompress it yourself")
        whole = decoded(raw, 1, file.name)
        del raw
    if whole.fault is not None:
        yield whole.fault
        return
    yield from _elements(file, whole.text.removeprefix("\ufeff"))


def _elements(file: File, text: str) -> Iterator[Row | Fault]:
    at = _gap(text, 0)
    if text[at : at + 1] != "[":
        fix = "one object a line? name it .jsonl"
        raise file.refuse(_instead(text), "a list of objects", fix)
    at, number = _gap(text, at + 1), 0
    more = text[at : at + 1] != "]"
    while more:
        number += 1
        row, end = _element(file, text, at, f"{file.name} row {number}")
        yield row
        at = _gap(text, end)
        more = text[at : at + 1] == ","
        at = _gap(text, at + 1) if more else at
    if text[at : at + 1] != "]" or _gap(text, at + 1) != len(text):
        line = text.count("\n", 0, at) + 1
        raise file.refuse("text that is not JSON (the list ends otherwise)", "a list of objects", line=line)


def _element(file: File, text: str, at: int, where: str) -> tuple[Row | Fault, int]:
    """(the row that begins there, where it ends)."""
    try:
        value, end = _STRICT.raw_decode(text, at)
        return _checked(value, text[at:end], where), end
    except _RefusedError as error:
        fault = malformed(where, str(error), "one JSON object", "JSON has no NaN, and a key once")
    except (ValueError, RecursionError) as error:
        raise file.refuse(f"text that is not JSON ({error})", "a list of objects") from None
    try:
        return fault, _LENIENT.raw_decode(text, at)[1]
    except (ValueError, RecursionError) as error:
        raise file.refuse(f"text that is not JSON ({error})", "a list of objects") from None


def _gap(text: str, at: int) -> int:
    found = _GAP.match(text, at)
    return found.end() if found else at


def _instead(text: str) -> str:
    """What stands where a list should."""
    try:
        return f"a {type(_LENIENT.decode(text)).__name__}"
    except (ValueError, RecursionError) as error:
        return f"text that is not JSON ({error})"


class _TooLongError(Exception):
    """A record that took more bytes than it may."""


class _Feed:
    """Lines for csv.reader, which asks for one at a time: what a record took is known when it ends."""

    def __init__(self, source: Iterator[Line], limit: int) -> None:
        self._source, self._limit = source, limit
        self.begin()

    def begin(self) -> None:
        """A new record: nothing was taken for it yet."""
        self.first = self.last = self._num_bytes = 0
        self.fault: Fault | None = None

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = next(self._source)
        self.first, self.last = self.first or line.number, line.number
        self.fault = self.fault or line.fault
        self._num_bytes += line.num_bytes
        if self._num_bytes > self._limit:
            raise _TooLongError
        return line.text


def _records(source: Iterator[Line], delimiter: str, name: str, limit: int) -> Iterator[tuple[Any, str]]:
    """(cells or a fault, where the record begins)."""
    feed = _Feed(source, limit)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)  # lax, it drops quotes and swallows files
    while True:
        feed.begin()
        fault, fix = None, "close every quote, and double those inside a cell"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _TooLongError:
            got = f"a record of more than {limit:,} bytes, up to line {feed.last}"
            fault = malformed(f"{name}:{feed.first}", got, "a quote that closes", fix)
        except csv.Error as error:
            got = f"quotes that do not match ({error}), up to line {feed.last}"
            if "new-line" in str(error):
                got, fix = "a carriage return that ends no line", "quote the cell, or end lines by line feeds"
            fault = malformed(f"{name}:{feed.first}", got, "cells that can be told apart", fix)
        yield feed.fault or fault or cells, f"{name}:{feed.first}"


def _header(file: File, records: Iterator[tuple[Any, str]]) -> list[str]:
    """The names of the columns: the first record that is not blank."""
    for cells, where in records:
        if isinstance(cells, Fault):
            raise UserError(cells.problem)
        if cells:
            if (name := twice(cells)) is not None:
                line = int(where.rpartition(":")[2])
                raise file.refuse(f"the column {clipped(name)!r} twice", "columns of unlike names", line=line)
            return list(cells)
    return []


def table(file: File, limit: int = MAX_LINE_BYTES, *, delimiter: str = ",") -> Iterator[Row | Fault]:
    """Comma-separated cells below a header; cells may be quoted and then hold anything."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    with opened(file) as stream:
        if fault := wide(file, stream):
            yield fault
            return
        limit = min(limit, MAX_RECORD_BYTES)
        records = _records(lines(stream, file.name, limit), delimiter, file.name, limit)
        header = _header(file, records)
        for cells, where in records:
            if isinstance(cells, Fault):
                yield cells
            elif cells and len(cells) != len(header):
                fix = "quote cells that hold a comma or a line break"
                yield malformed(where, f"{len(cells)} cells", f"{len(header)}, as in the header", fix)
            elif cells:
                yield Row(dict(zip(header, cells, strict=True)), where)


def tabbed(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """A table with tabs between its cells."""
    return table(file, limit, delimiter="\t")


def paragraphs(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """Raw text: paragraphs (blocks between blank lines) are rows."""
    with opened(file) as stream:
        if fault := wide(file, stream):
            yield fault
            return
        block: list[str] = []
        start = num_bytes = 0  # start: the paragraph's first line, 0 between paragraphs
        for line in chain(lines(stream, file.name, limit), [Line(0, "", 0)]):
            if line.fault is None and not line.text.strip():
                if start:
                    yield fault or Row({"text": "\n".join(block)}, f"{file.name}:{start}")
                start, num_bytes, fault = 0, 0, None
                block.clear()
                continue
            start = start or line.number
            num_bytes += line.num_bytes
            fault = fault or line.fault
            if num_bytes > limit and fault is None:
                got, fix = f"a paragraph of more than {limit:,} bytes", "put blank lines between paragraphs"
                fault = malformed(f"{file.name}:{start}", got, "paragraphs between blank lines", fix)
            if fault:
                block.clear()
            else:
                block.append(line.text.rstrip("\r\n"))
