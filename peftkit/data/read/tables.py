"""Parquet and Arrow, batch by batch; their values become what JSON could hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from peftkit.data.read.rows import Fault, File, Row, malformed, misencoded, twice
from peftkit.data.read.streams import MAX_LINE_BYTES, seems, unpacked
from peftkit.units import clipped

_BATCH = 128
_BUFFER = 2**20
_ARROW = b"ARROW1"


class _UnreadableError(Exception):
    """A value that has no text, such as bytes."""


def parquet(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """The rows of a Parquet file, never more than a batch of them in memory."""
    import pyarrow
    import pyarrow.parquet

    with (
        unpacked(file) as path,
        _told(file, path, "Parquet"),
        pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, page_checksum_verification=True) as found,
    ):
        yield from rows_of(file, found.schema_arrow, found.iter_batches(_BATCH))


def arrow(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """The rows of an Arrow IPC file or stream (`datasets` writes streams)."""
    import pyarrow

    with unpacked(file) as path, _told(file, path, "Arrow"), pyarrow.memory_map(str(path)) as source:
        is_file = source.read(len(_ARROW)) == _ARROW
        source.seek(0)
        found = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        numbers = range(found.num_record_batches) if is_file else ()
        batches = (found.get_batch(number) for number in numbers) if is_file else iter(found)
        yield from rows_of(file, found.schema, _cut(batches))


@contextlib.contextmanager
def _told(file: File, path: Path, kind: str) -> Iterator[None]:
    """Tell what pyarrow raises as an error of the file."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        with path.open("rb") as stream:
            actual = seems(stream.read(16))
        if actual and not actual.startswith(kind):
            got, fix = f"a file that is not {kind} but {actual}", "name the file for what it holds"
        else:
            said = (str(error).splitlines() or [type(error).__name__])[0][:160]
            got, fix = f"a file that is not {kind}, or is damaged ({said})", "fetch or write it again"
        raise file.refuse(got, f"a whole {kind} file", fix) from None


def _cut(batches: Iterable[Any]) -> Iterator[Any]:
    """The same rows in small batches: one of a million rows would become a million dicts at once."""
    for batch in batches:
        _check(batch)
        for start in range(0, batch.num_rows, _BATCH):
            yield batch.slice(start, _BATCH)


def _check(batch: Any) -> None:
    """Raises ArrowInvalid for offsets that point astray: followed, they end the process.

    Text that is not UTF-8 is left to the row that holds it.
    """
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "Invalid UTF8" not in str(error):
                raise


def rows_of(file: File, schema: Any, batches: Iterable[Any]) -> Iterator[Row | Fault]:
    """The rows of Arrow batches; one that has no JSON form is a fault."""
    if (name := twice(schema.names)) is not None:
        raise file.refuse(f"the column {clipped(name)!r} twice", "columns of unlike names")
    coarse = _microseconds(schema)
    special = [field.name for field in schema if not _is_plain(field.type)]
    number = 0
    for batch in batches:
        for fields in _dicts(batch, coarse):
            number += 1
            yield _row(fields, special, f"{file.name} row {number}")


def _dicts(batch: Any, schema: Any) -> Iterator[dict[str, Any] | Exception]:
    """The batch as dicts. Where that fails, row by row, with what went wrong in place of a row."""
    try:
        batch = batch if schema is None else batch.cast(schema, safe=False)
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except Exception as error:  # noqa: BLE001  conversions raise many types: each row's own is told
        if batch.num_rows == 1:
            yield error
            return
        for number in range(batch.num_rows):
            yield from _dicts(batch.slice(number, 1), schema)


def _row(fields: dict[str, Any] | Exception, special: list[str], where: str) -> Row | Fault:
    if isinstance(fields, UnicodeDecodeError):
        byte = fields.object[fields.start]
        return misencoded(where, f"the byte 0x{byte:02x}", "write the column as UTF-8 text")
    if isinstance(fields, Exception):
        return malformed(where, f"a value that cannot be read ({fields})", "text, numbers, lists or objects")
    for name in special:
        try:
            fields[name] = plain(fields[name])
        except _UnreadableError as error:
            fix = "write it as text, or leave it out"
            return malformed(where, f"{error} {name}", "text, numbers, lists or objects", fix)
    return Row(fields, where)


def plain(value: Any) -> Any:
    """A value of Arrow as JSON would hold it: dates, times and decimals as ISO text."""
    match value:
        case None | str() | bool() | int() | float():
            return value
        case dict():
            # a struct has all its fields in every row: what a row did not have is null
            return {
                name if isinstance(name, str) else str(plain(name)): plain(of)
                for name, of in value.items()
                if of is not None
            }
        case list() | tuple():
            return [plain(item) for item in value]
        case date() | time():  # a datetime is a date
            return value.isoformat()
        case timedelta():
            return f"PT{value / timedelta(seconds=1)}S"
        case Decimal():
            return f"{value:f}"
        case bytes():
            raise _UnreadableError("a binary column")
    raise _UnreadableError(f"a column of {type(value).__name__}")


def _is_plain(kind: Any) -> bool:
    """Whether values of the type need no conversion. Structs do: they hold nulls that no row wrote."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)
    number = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return bool(text or number)


def _microseconds(schema: Any) -> Any:
    """The schema with nanoseconds cut to the microseconds of Python's times; None without any."""
    import pyarrow

    fields = [field.with_type(_coarse(field.type)) for field in schema]
    coarse = pyarrow.schema(fields, schema.metadata)
    return None if coarse.equals(schema) else coarse


def _coarse(kind: Any) -> Any:
    import pyarrow
    from pyarrow import types

    if types.is_timestamp(kind) and kind.unit == "ns":
        return pyarrow.timestamp("us", kind.tz)
    if types.is_duration(kind) and kind.unit == "ns":
        return pyarrow.duration("us")
    if types.is_time64(kind) and kind.unit == "ns":
        return pyarrow.time64("us")
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_coarse(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_coarse(kind.value_type)))
    if types.is_struct(kind):
        inner = (kind.field(number) for number in range(kind.num_fields))
        return pyarrow.struct([field.with_type(_coarse(field.type)) for field in inner])
    return kind
