"""Readers of Parquet and Arrow, batch by batch; values become what JSON can hold."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from peftkit.data.read.rows import Fault, File, Row, encoding_fault, first_duplicate, malformed_fault
from peftkit.data.read.streams import MAX_LINE_BYTES, detect_binary, seekable_path
from peftkit.units import shorten

_BATCH_ROWS = 128
_BUFFER_BYTES = 2**20
_ARROW_MAGIC = b"ARROW1"


class _UnreadableError(Exception):
    """A value that has no JSON form, such as bytes."""


def read_parquet(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """Yield the rows of a Parquet file, never more than a batch of them in memory."""
    import pyarrow
    import pyarrow.parquet

    with (
        seekable_path(file) as path,
        _translate_arrow_errors(file, path, "Parquet"),
        pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as parquet_file,
    ):
        yield from rows_of_batches(file, parquet_file.schema_arrow, parquet_file.iter_batches(_BATCH_ROWS))


def read_arrow(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """Yield the rows of an Arrow IPC file or stream (`datasets` writes streams)."""
    import pyarrow

    with (
        seekable_path(file) as path,
        _translate_arrow_errors(file, path, "Arrow"),
        pyarrow.memory_map(str(path)) as source,
    ):
        is_file = source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        numbers = range(reader.num_record_batches) if is_file else ()
        batches = (reader.get_batch(number) for number in numbers) if is_file else iter(reader)
        yield from rows_of_batches(file, reader.schema, _small_batches(batches))


@contextlib.contextmanager
def _translate_arrow_errors(file: File, path: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises into a UserError of the file."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        with path.open("rb") as stream:
            actual_kind = detect_binary(stream.read(16))
        if actual_kind and not actual_kind.startswith(kind):
            got, fix = f"a file that is not {kind} but {actual_kind}", "name the file for what it holds"
        else:
            message = (str(error).splitlines() or [type(error).__name__])[0][:160]
            got, fix = f"a file that is not {kind}, or is damaged ({message})", "fetch or write it again"
        raise file.refuse(got, f"a whole {kind} file", fix) from None


def _small_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows in small batches: one batch of a million rows would become a million dicts at once.

    Raises ArrowInvalid for offsets outside their buffer, which would crash the process. Text that is not
    UTF-8 is left to the row that holds it.
    """
    import pyarrow

    for batch in batches:
        for column in batch.columns:
            try:
                column.validate(full=True)
            except pyarrow.ArrowInvalid as error:
                if "Invalid UTF8" not in str(error):
                    raise
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.slice(start, _BATCH_ROWS)


def rows_of_batches(file: File, schema: Any, batches: Iterable[Any]) -> Iterator[Row | Fault]:
    """Yield the rows of Arrow batches; a row without a JSON form is a fault."""
    import pyarrow

    if (name := first_duplicate(schema.names)) is not None:
        raise file.refuse(f"the column {shorten(name)!r} twice", "unique column names")
    # nanoseconds are cut to the microseconds of Python's times; None: no column has any
    microsecond_fields = [field.with_type(_microsecond_type(field.type)) for field in schema]
    microsecond_schema = pyarrow.schema(microsecond_fields, schema.metadata)
    coarse = None if microsecond_schema.equals(schema) else microsecond_schema
    complex_columns = [field.name for field in schema if not _is_json_type(field.type)]
    number, class_names = 0, _class_names(schema.metadata)
    for batch in batches:
        for fields in _batch_dicts(batch, coarse):
            number += 1
            for name, names in class_names.items():
                if isinstance(fields, dict) and name in fields:
                    fields[name] = _name_of_class(fields[name], names)
            yield _row_or_fault(fields, complex_columns, f"{file.name} row {number}")


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names of the classes of `datasets`' ClassLabel columns, and of lists of them, by column."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    class_names = {}
    if not isinstance(features, dict):
        return {}
    for name, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
            class_names[name] = [str(one) for one in inner["names"]]
    return class_names


def _name_of_class(value: Any, names: list[str]) -> Any:
    """Return the name of a class's number, or of each in a list; -1 stands for no class."""
    if isinstance(value, list):
        return [_name_of_class(item, names) for item in value]
    if isinstance(value, int) and -1 <= value < len(names):
        return None if value == -1 else names[value]
    return value


def _batch_dicts(batch: Any, schema: Any) -> Iterator[dict[str, Any] | Exception]:
    """Yield a batch's rows as dicts. If that fails, convert row by row, with errors in place of bad rows."""
    try:
        batch = batch if schema is None else batch.cast(schema, safe=False)
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except Exception as error:  # noqa: BLE001  conversions raise many types: each row's own is told
        if batch.num_rows == 1:
            yield error
            return
        for number in range(batch.num_rows):
            yield from _batch_dicts(batch.slice(number, 1), schema)


def _row_or_fault(fields: dict[str, Any] | Exception, complex_columns: list[str], where: str) -> Row | Fault:
    if isinstance(fields, UnicodeDecodeError):
        byte = fields.object[fields.start]
        return encoding_fault(where, f"the byte 0x{byte:02x}", "write the column as UTF-8 text")
    if isinstance(fields, Exception):
        return malformed_fault(where, f"a value that cannot be read ({fields})", "text, numbers, lists or objects")
    for name in complex_columns:
        try:
            fields[name] = to_json_value(fields[name])
        except _UnreadableError as error:
            fix = "write it as text, or leave it out"
            return malformed_fault(where, f"{error} {name}", "text, numbers, lists or objects", fix)
    return Row(fields, where)


def to_json_value(value: object) -> Any:
    """Return an Arrow value as JSON can hold it: dates, times and decimals as ISO text."""
    match value:
        case None | str() | bool() | int() | float():
            return value
        case dict():
            # a struct has all its fields in every row: what a row did not have is null
            return {
                name if isinstance(name, str) else str(to_json_value(name)): to_json_value(field_value)
                for name, field_value in value.items()
                if field_value is not None
            }
        case list() | tuple():
            return [to_json_value(item) for item in value]
        case date() | time():  # a datetime is a date
            return value.isoformat()
        case timedelta():
            return f"PT{value / timedelta(seconds=1)}S"
        case Decimal():
            return f"{value:f}"
        case bytes():
            raise _UnreadableError("a binary column")
    raise _UnreadableError(f"a column of {type(value).__name__}")


def _is_json_type(kind: Any) -> bool:
    """Return whether values of a type need no conversion. Structs do: they hold nulls that no row wrote."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json_type(kind.value_type)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)
    number = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return bool(text or number)


def _microsecond_type(kind: Any) -> Any:
    import pyarrow
    from pyarrow import types

    if types.is_timestamp(kind) and kind.unit == "ns":
        return pyarrow.timestamp("us", kind.tz)
    if types.is_duration(kind) and kind.unit == "ns":
        return pyarrow.duration("us")
    if types.is_time64(kind) and kind.unit == "ns":
        return pyarrow.time64("us")
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_microsecond_type(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_microsecond_type(kind.value_type)))
    if types.is_struct(kind):
        fields = (kind.field(number) for number in range(kind.num_fields))
        return pyarrow.struct([field.with_type(_microsecond_type(field.type)) for field in fields])
    return kind
