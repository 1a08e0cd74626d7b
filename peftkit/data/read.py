"""Rows from files and hub datasets, each knowing its file and line. The only home of `datasets`."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.recipe.paths import is_data_path

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Row:
    """One row as it was read. `where` is 'file:line', or 'name row N' where lines mean nothing."""

    fields: Mapping[str, Any]
    where: str


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            Problem(
                f"{path}:{line}",
                f"the byte 0x{raw[error.start]:02x}",
                "UTF-8 text",
                "convert the file to UTF-8",
            )
        ) from None


def _jsonl(path: Path) -> list[Row]:
    rows, problems = [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(
                Problem(f"{path}:{number}", f"a line that is not JSON ({error})", "one JSON object")
            )
            continue
        if isinstance(value, dict):
            rows.append(Row(value, f"{path}:{number}"))
        else:
            problems.append(Problem(f"{path}:{number}", f"a {type(value).__name__}", "one JSON object"))
    if problems:
        more = len(problems) - MAX_PROBLEMS
        extra = (
            [Problem(str(path), f"{more} more malformed lines", "one JSON object a line")] if more > 0 else []
        )
        raise UserError([*problems[:MAX_PROBLEMS], *extra])
    return rows


def _json(path: Path) -> list[Row]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise UserError(
            Problem(
                str(path),
                f"text that is not JSON ({error})",
                "a list of objects",
                "one object a line? name it .jsonl",
            )
        ) from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(Problem(str(path), f"a {type(value).__name__}", "a list of objects"))
    return [Row(item, f"{path} row {number}") for number, item in enumerate(value, start=1)]


def _csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    reader = csv.reader(
        io.StringIO(_text(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ","
    )
    rows, problems = [], []
    header = next(reader, [])
    before = reader.line_num
    for cells in reader:
        where, before = f"{path}:{before + 1}", reader.line_num
        if not cells:
            continue
        if len(cells) != len(header):
            problems.append(
                Problem(
                    where,
                    f"{len(cells)} cells",
                    f"{len(header)}, as in the header",
                    "quote cells that hold a comma or a line break",
                )
            )
        else:
            rows.append(Row(dict(zip(header, cells, strict=True)), where))
    if problems:
        raise UserError(problems[:MAX_PROBLEMS])
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise UserError(
            Problem(str(path), f"a file that is not Parquet ({error})", "a Parquet file")
        ) from None
    return [Row(item, f"{path} row {number}") for number, item in enumerate(table.to_pylist(), start=1)]


def _plain(path: Path) -> list[Row]:
    """Raw text: paragraphs (blocks between blank lines) are rows."""
    rows: list[Row] = []
    block: list[str] = []
    start = 1
    for number, line in enumerate([*_text(path).split("\n"), ""], start=1):
        if line.strip():
            start = number if not block else start
            block.append(line)
        elif block:
            rows.append(Row({"text": "\n".join(block)}, f"{path}:{start}"))
            block = []
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _plain,
}


def _hub(name: str, split: str, where: str) -> list[Row]:
    if os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"} and not Path(name).exists():
        fix = "give a file, or unset HF_HUB_OFFLINE"
        raise UserError(
            Problem(where, f"the hub dataset {name!r} while HF_HUB_OFFLINE is set", "data at hand", fix)
        )
    import datasets

    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:
        # datasets raises a dozen unrelated types for the same thing: it cannot be had
        raise UserError(
            Problem(
                where,
                f"the hub dataset {name!r} [{split}] ({str(error).splitlines()[0][:160]})",
                "a dataset that can be read",
                "check the name and split, or give a file",
            )
        ) from error
    return [Row(item, f"{name}[{split}] row {number}") for number, item in enumerate(found, start=1)]


def read_rows(sources: Sequence[str], *, where: str, split: str = "train") -> list[Row]:
    """All rows of files and hub datasets, in order.

    Raises UserError (file, line, what is wrong) for what is missing, malformed or empty.
    """
    rows: list[Row] = []
    for source in sources:
        if not is_data_path(source):
            rows.extend(_hub(source, split, where))
            continue
        path = Path(source)
        if not path.is_file():
            here = Path.cwd() / path.name
            fix = (
                f"there is {here}: paths in a recipe are relative to the recipe"
                if here.is_file()
                else "paths in a recipe are relative to the recipe's folder"
            )
            raise UserError(Problem(where, f"{source}, which is not there", "a data file", fix))
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(Problem(where, source, f"a file of a known kind: {', '.join(_READERS)}"))
        found = reader(path)
        if not found:
            raise UserError(Problem(str(path), "no rows", "at least one row"))
        rows.extend(found)
    return rows


def to_dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A `datasets.Dataset` of tokenized rows, as the trainer wants it."""
    import datasets

    return datasets.Dataset.from_list([dict(row) for row in rows])
