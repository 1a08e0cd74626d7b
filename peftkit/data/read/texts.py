"""Readers of text files: JSON lines and arrays, CSV, paragraphs. All but JSON arrays are streamed."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NoReturn

from peftkit.data.read.rows import Fault, File, Row, encoding_fault, first_duplicate, malformed_fault
from peftkit.data.read.streams import (
    MAX_LINE_BYTES,
    Line,
    check_encoding,
    decode_line,
    open_decompressed,
    read_lines,
    split_suffixes,
)
from peftkit.errors import UserError
from peftkit.units import join_names, shorten

MAX_COMPRESSED_ARRAY_BYTES = 512 * 2**20  # a file that is not compressed shows its size
MAX_RECORD_BYTES = 16 * 2**20  # of a table: the csv module takes four bytes and more for each
_PEEK_BYTES = 4096
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|\])")
_BLANKS = re.compile(r"[ \t\r\n]*")
_ROW_KEYS = {"data", "rows", "examples", "items", "records", "instances", "samples", "dataset", "entries", "train"}


class _InvalidValueError(ValueError):
    """A value that Python's json accepts and a row must not hold: NaN, infinity, a repeated key."""


def _reject_constant(name: str) -> NoReturn:
    raise _InvalidValueError(f"the number {name}")


def _parse_finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _reject_constant(shorten(text))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _InvalidValueError(f"the key {shorten(first_duplicate(name for name, _ in pairs) or '')!r} twice")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_reject_constant, parse_float=_parse_finite)
_LENIENT = json.JSONDecoder()


def _row_or_fault(value: object, text: str, where: str) -> Row | Fault:
    """Return the row of a parsed value; a fault if it is not an object or holds half of a surrogate pair."""
    if not isinstance(value, dict):
        return malformed_fault(where, f"a {type(value).__name__}", "one JSON object")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            surrogate = f"\\u{ord(error.object[error.start]):04x}"
            return encoding_fault(where, f"half of a surrogate pair ({surrogate})", "write the character itself")
    return Row(value, where)


def read_json_lines(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """Yield the rows of a JSON lines file: one object per line. A JSON array of that name is read as one."""
    with open_decompressed(file) as stream:
        if fault := check_encoding(file, stream):
            yield fault
            return
        begins_like_array = _ARRAY.match(stream.peek(_PEEK_BYTES))
        lines = (line for line in read_lines(stream, file.name, limit) if line.fault or not line.text.isspace())
        head = list(islice(lines, 2)) if begins_like_array else []
        # no array goes on with "{" after "]": the first line is then a broken row of its own
        has_rows_after = len(head) == 2 and (head[0].text.rstrip()[-1:], head[1].text.lstrip()[:1]) == ("]", "{")
        if begins_like_array and not has_rows_after:
            yield from read_json_array(file, limit)
            return
        for line in chain(head, lines):
            if line.fault is not None:
                yield line.fault
            else:
                where = f"{file.name}:{line.number}"
                try:
                    item = _row_or_fault(_STRICT.decode(line.text), line.text, where)
                except _InvalidValueError as error:
                    item = malformed_fault(
                        where, str(error), "one JSON object", "JSON has no NaN, and each key only once"
                    )
                except (ValueError, RecursionError) as error:
                    item = malformed_fault(where, f"a line that is not JSON ({error})", "one JSON object")
                yield item


def read_json_array(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """Yield the rows of a JSON array of objects. The text is loaded whole; its rows are parsed one by one.

    An object is read where it holds such an array under one key (then named in each row's place), or columns.
    """
    with open_decompressed(file) as stream:
        if fault := check_encoding(file, stream):
            yield fault
            return
        compression = split_suffixes(file.path)[1]
        raw = stream.read(MAX_COMPRESSED_ARRAY_BYTES + 1) if compression else stream.read()
        if compression and len(raw) > MAX_COMPRESSED_ARRAY_BYTES:
            got = f"one JSON array that expands to more than {MAX_COMPRESSED_ARRAY_BYTES:,} bytes"
            raise file.refuse(got, "less, or JSON lines, which are read one by one", "decompress it yourself")
        document = decode_line(raw, 1, file.name)
        del raw
    if document.fault is not None:
        yield document.fault
        return
    text = document.text.removeprefix("\ufeff")
    position = _skip_blanks(text, 0)
    if text[position : position + 1] != "[":
        yield from _rows_of_object(file, text)
        return
    position, number = _skip_blanks(text, position + 1), 0
    has_more = text[position : position + 1] != "]"
    while has_more:
        number += 1
        row, end = _array_element(file, text, position, f"{file.name} row {number}")
        yield row
        position = _skip_blanks(text, end)
        has_more = text[position : position + 1] == ","
        position = _skip_blanks(text, position + 1) if has_more else position
    if text[position : position + 1] != "]" or _skip_blanks(text, position + 1) != len(text):
        line = text.count("\n", 0, position) + 1
        raise file.refuse(
            "text that is not JSON (a comma or the end of the list is due)", "a list of objects", line=line
        )


def _rows_of_object(file: File, text: str) -> Iterator[Row | Fault]:
    """Yield the rows that an object holds: a list under one key, or columns as lists or as pandas writes them.

    Raises UserError for any other JSON, and for several lists of rows.
    """
    try:
        value = _STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        got = f"text that is not JSON ({error})"
        raise file.refuse(got, "a list of objects", "one object a line? name it .jsonl") from None
    if not isinstance(value, dict):
        raise file.refuse(f"a {type(value).__name__}", "a list of objects")
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows}
    tables = {key: rows for key, rows in lists.items() if all(isinstance(row, dict) for row in rows)}
    turn_keys = ({"role", "content"}, {"from", "value"})
    has_turns = any(keys <= row.keys() for rows in tables.values() for row in rows for keys in turn_keys)
    if len(tables) > 1 and not has_turns:
        got, fix = f"lists of rows under {', '.join(map(shorten, tables))}", "write each to a file of its own"
        raise file.refuse(got, "one list of rows", fix)
    # what stands beside the rows describes them; a text or a list may be what a single row says
    named = tables.keys() & _ROW_KEYS
    beside = [other for key, other in value.items() if key not in tables]
    says_more = any((isinstance(other, str) and " " in other.strip()) or isinstance(other, dict) for other in beside)
    if len(tables) == len(lists) == 1 and not has_turns and (named or not says_more):
        [(key, rows)] = tables.items()
    elif not tables and (columns := _columns_of(value)):
        key, rows = "columns", [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    else:
        got = f"an object with {join_names(list(value))}"
        fix = "one object a line? name it .jsonl; one row alone? put it in a list"
        raise file.refuse(got, "a list of objects, or an object that holds one", fix)
    surrogates = "\\ud" if re.search(r"\\u[dD]", text) else ""  # the whole text is looked through once
    for number, row in enumerate(rows, start=1):
        yield _row_or_fault(row, surrogates, f"{file.name} {shorten(key)} row {number}")


def _columns_of(value: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the columns of an object that holds lists of cells, or cells by row number as pandas writes them.

    Empty for anything else: lists of several lengths, rows by name, pandas' split form.
    """
    columns = list(value.values())
    if value.keys() == {"columns", "index", "data"}:
        return {}
    is_number = re.compile(r"[0-9]{1,18}").fullmatch
    if all(isinstance(column, dict) and all(map(is_number, column)) for column in columns):
        numbers = {tuple(sorted(column, key=int)) for column in columns}
        if len(numbers) != 1:
            return {}
        order = next(iter(numbers))
        return {name: [column[number] for number in order] for name, column in value.items()}
    has_cells = all(isinstance(column, list) and not any(isinstance(c, dict) for c in column) for column in columns)
    return value if has_cells and len({*map(len, columns)}) == 1 else {}


def _array_element(file: File, text: str, position: int, where: str) -> tuple[Row | Fault, int]:
    """Return (the row that begins at `position`, its end). Raises UserError if the rest cannot be parsed."""
    try:
        value, end = _STRICT.raw_decode(text, position)
        return _row_or_fault(value, text[position:end], where), end
    except _InvalidValueError as error:
        fault = malformed_fault(where, str(error), "one JSON object", "JSON has no NaN, and each key only once")
    except (ValueError, RecursionError) as error:
        raise file.refuse(f"text that is not JSON ({error})", "a list of objects") from None
    try:
        return fault, _LENIENT.raw_decode(text, position)[1]
    except (ValueError, RecursionError) as error:
        raise file.refuse(f"text that is not JSON ({error})", "a list of objects") from None


def _skip_blanks(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    return match.end() if match else position


class _RecordTooLongError(Exception):
    """A record of more bytes than the limit."""


class _RecordLines:
    """Lines for csv.reader, which asks for one at a time: the bytes of a record are known when it ends."""

    def __init__(self, source: Iterator[Line], limit: int) -> None:
        self._source, self._limit = source, limit
        self.begin()

    def begin(self) -> None:
        """Start a new record with zero bytes."""
        self.first = self.last = self._num_bytes = 0
        self.fault: Fault | None = None

    def __iter__(self) -> _RecordLines:
        return self

    def __next__(self) -> str:
        line = next(self._source)
        self.first, self.last = self.first or line.number, line.number
        self.fault = self.fault or line.fault
        self._num_bytes += line.num_bytes
        if self._num_bytes > self._limit:
            raise _RecordTooLongError
        return line.text


def _csv_records(source: Iterator[Line], delimiter: str, name: str, limit: int) -> Iterator[tuple[Any, str]]:
    """Yield (cells or a fault, where the record begins)."""
    feed = _RecordLines(source, limit)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)  # lax, it drops quotes and swallows files
    while True:
        feed.begin()
        fault, fix = None, "close every quote, and double those inside a cell"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _RecordTooLongError:
            got = f"a record of more than {limit:,} bytes, up to line {feed.last}"
            fault = malformed_fault(f"{name}:{feed.first}", got, "a quote that closes", fix)
        except csv.Error as error:
            got, expected = f"quotes that do not match ({error}), up to line {feed.last}", "matching quotes"
            if "new-line" in str(error):
                got, expected = "a carriage return that ends no line", "lines that end in line feeds"
                fix = "quote the cell, or end lines by line feeds"
            fault = malformed_fault(f"{name}:{feed.first}", got, expected, fix)
        yield feed.fault or fault or cells, f"{name}:{feed.first}"


def _read_header(file: File, records: Iterator[tuple[Any, str]]) -> list[str]:
    """The names of the columns: the first record that is not blank."""
    for cells, where in records:
        if isinstance(cells, Fault):
            raise UserError(cells.problem)
        if cells:
            if (name := first_duplicate(cells)) is not None:
                line = int(where.rpartition(":")[2])
                raise file.refuse(f"the column {shorten(name)!r} twice", "unique column names", line=line)
            return list(cells)
    return []


def csv_delimiter(header: str, next_line: str = "") -> str:
    """Return what separates the columns of a CSV file: what occurs most in its header, a comma on a tie.

    Of several in the header, one that occurs as often in the next line comes first. What stands in quotes does
    not count. Example: "text;label" -> ";".
    """
    bare, below = (re.sub(r'"[^"]*"', "", line) for line in (header, next_line))
    counts = {delimiter: bare.count(delimiter) for delimiter in (",", ";", "\t", "|") if delimiter in bare}
    alike = {one: count for one, count in counts.items() if below.count(one) == count}
    return max(alike or counts, key=lambda one: counts[one], default=",")


def read_csv(file: File, limit: int = MAX_LINE_BYTES, *, delimiter: str = "") -> Iterator[Row | Fault]:
    """Yield the rows of a CSV file: cells below a header; quoted cells may hold anything.

    Without a `delimiter` the header tells: European spreadsheets write semicolons.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    with open_decompressed(file) as stream:
        if fault := check_encoding(file, stream):
            yield fault
            return
        limit = min(limit, MAX_RECORD_BYTES)
        if not delimiter:
            head = stream.peek(_PEEK_BYTES).decode("utf-8", errors="replace").lstrip("\ufeff\r\n")
            first_line, _, rest = head.partition("\n")
            delimiter = csv_delimiter(first_line, rest.partition("\n")[0])
        records = _csv_records(read_lines(stream, file.name, limit), delimiter, file.name, limit)
        header = _read_header(file, records)
        for cells, where in records:
            if isinstance(cells, Fault):
                yield cells
            elif cells and len(cells) != len(header):
                fix = "quote cells that hold a comma or a line break"
                yield malformed_fault(where, f"{len(cells)} cells", f"{len(header)}, as in the header", fix)
            elif cells:
                yield Row(dict(zip(header, cells, strict=True)), where)


def read_tsv(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """Yield the rows of a TSV file."""
    return read_csv(file, limit, delimiter="\t")


def read_paragraphs(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """Yield the paragraphs of raw text (blocks between blank lines) as rows with the field `text`."""
    with open_decompressed(file) as stream:
        if fault := check_encoding(file, stream):
            yield fault
            return
        block: list[str] = []
        start = num_bytes = 0  # start: the paragraph's first line, 0 between paragraphs
        for line in chain(read_lines(stream, file.name, limit), [Line(0, "", 0)]):
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
                fault = malformed_fault(f"{file.name}:{start}", got, "paragraphs between blank lines", fix)
            if fault:
                block.clear()
            else:
                block.append(line.text.rstrip("\r\n"))
