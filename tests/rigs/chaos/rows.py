"""Data files of every kind, whole and broken, and an independent look at what is in them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rigs.chaos.schema_values import TINY
from tests.rigs.chaos.watch import Run, WrongSuccess

_ASSETS = TINY.parent / "data"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A file, and what has to be read of it.

    `rows` are all that can be used, in order; None where only the file itself can tell. `num_bad` rows are
    broken: they stop a run, and are counted where that is waived. `format` is the recipe's data.format.
    """

    what: str
    name: str
    content: bytes
    rows: Rows | None = None
    num_bad: int = 0
    format: str = "auto"


# --- whole files


def _real(rng: random.Random) -> tuple[str, Rows]:
    """(format, a few real rows)."""
    lines = (_ASSETS / "gsm8k.train.jsonl").read_text(encoding="utf-8").splitlines()
    num = rng.randint(1, 12)
    found = [json.loads(line) for line in rng.sample(lines, num)]
    pairs = [(row["question"], row["answer"]) for row in found]
    which = rng.choice(["prompt-completion", "chat", "text", "classification", "instruction"])
    if which == "prompt-completion":
        return which, [{"prompt": q, "completion": a} for q, a in pairs]
    if which == "chat":
        return which, [{"messages": [_turn("user", q), _turn("assistant", a)]} for q, a in pairs]
    if which == "text":
        return which, [{"text": f"{q}\n{a}"} for q, a in pairs]
    if which == "classification":
        return which, [{"text": q, "label": rng.choice(["long", "short"])} for q, _ in pairs]
    return which, [{"instruction": q, "input": "", "output": a} for q, a in pairs]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _line(rng: random.Random, row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=rng.random() < 0.5, separators=rng.choice([None, (",", ":")]))
    return rng.choice(["", "", " "]).encode() + text.encode()


def _jsonl(rng: random.Random, rows: Rows) -> bytes:
    ends = rng.choice([[b"\n"], [b"\r\n"], [b"\n", b"\r\n", b"\n\n", b"\n \t\n"]])
    return b"".join(_line(rng, row) + rng.choice(ends) for row in rows)


def _json(rng: random.Random, rows: Rows) -> bytes:
    return json.dumps(rows, indent=rng.choice([None, 0, 2]), ensure_ascii=rng.random() < 0.5).encode()


def _table(rng: random.Random, rows: Rows, delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    ends = rng.choice(["\n", "\r\n"])
    quoting = rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=ends, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _parquet(rng: random.Random, rows: Rows) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        out,
        compression=rng.choice(["none", "snappy", "zstd", "gzip"]),
        row_group_size=rng.choice([1, 3, 100]),
        use_dictionary=rng.random() < 0.5,
        write_page_checksum=rng.random() < 0.5,
        data_page_version=rng.choice(["1.0", "2.0"]),
    )
    return out.getvalue()


def _arrow(rng: random.Random, rows: Rows) -> bytes:
    import pyarrow

    table, out = pyarrow.Table.from_pylist(rows), io.BytesIO()
    new = rng.choice([pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
    options = pyarrow.ipc.IpcWriteOptions(compression=rng.choice([None, "zstd", "lz4"]))
    with new(out, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rng.choice([1, 4, 100]))
    return out.getvalue()


def _paragraphs(rng: random.Random, rows: Rows) -> bytes:
    end = rng.choice(["\n", "\r\n"])
    gap = rng.choice([end * 2, end * 3, f"{end} {end}"])
    return gap.join(row["text"].replace("\n", end) for row in rows).encode()


WRITERS: dict[str, Callable[[random.Random, Rows], bytes]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": lambda rng, rows: _table(rng, rows, ","),
    ".tsv": lambda rng, rows: _table(rng, rows, "\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _paragraphs,
}
_TEXT = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def _suffix(rng: random.Random, form: str) -> str:
    flat = form != "chat"
    fits = [s for s in WRITERS if (s != ".txt" or form == "text") and (flat or s not in {".csv", ".tsv"})]
    return rng.choice([*fits, ".jsonl"])


def packed(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """(suffix, the content as it is, or compressed)."""
    way = rng.random()
    if way < 0.7:
        return "", content
    if way < 0.85:
        return ".gz", gzip.compress(content, mtime=0)
    import pyarrow

    return ".zst", pyarrow.Codec("zstd").compress(content, asbytes=True)


def whole(rng: random.Random) -> Case:
    """A file that is read to its last row."""
    form, rows = _real(rng)
    suffix = _suffix(rng, form)
    if suffix == ".txt":
        rows = [{"text": "\n".join(line for line in row["text"].split("\n") if line.strip())} for row in rows]
    content = WRITERS[suffix](rng, rows)
    if suffix in _TEXT and rng.random() < 0.2:
        content = b"\xef\xbb\xbf" + content
    if suffix in _TEXT and rng.random() < 0.2:
        content = content.rstrip(b"\r\n")
    more, content = packed(rng, content)
    return Case("whole", f"rows{suffix}{more}", content, rows)


# --- rows with one planted fault

_DEEP = b"[" * 100_000


def _spoilt_line(rng: random.Random, row: dict[str, Any], line: bytes) -> bytes:
    """The line of a row, broken: it is no row any more."""
    first = next(iter(row))
    at = line.index(b'"', line.index(b":")) + 1 if b'"' in line[line.index(b":") :] else len(line) // 2
    ways: list[Callable[[], bytes]] = [
        lambda: line[:at] + b"\0" + line[at:],
        lambda: (
            line[:at] + rng.choice([b"\xff", b"\xe9", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"]) + line[at:]
        ),
        lambda: line[: rng.randint(at, len(line) - 1)],
        lambda: line.rstrip()[:-1] + b', "x": NaN}',
        lambda: line.rstrip()[:-1] + b', "x": -Infinity}',
        lambda: line.rstrip()[:-1] + b', "x": 1e999}',
        lambda: line.rstrip()[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        lambda: line.rstrip()[:-1] + b', "x": [1, {"y": 1, "y": 2}]}',
        lambda: line.rstrip()[:-1] + f', "{first}": "again"}}'.encode(),
        lambda: line.rstrip()[:-1] + rb', "x": "\ud800"}',
        lambda: line.rstrip()[:-1] + rb', "x": "\udc00\ud800"}',
        lambda: line.rstrip()[:-1] + b', "x": ' + _DEEP + b"}",
        lambda: line + b" " + line,
        lambda: line + b",",
        lambda: b"[" + line + b"]",
        lambda: rng.choice([b"null", b"1", b'"text"', b"true", b"{", b"}", b"x", b"[]", b"{}x", b"'a'"]),
        lambda: line.replace(b'"', b"'"),
    ]
    return rng.choice(ways)()


def _spoilt_row(rng: random.Random, form: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row that is JSON, and says nothing that can be learnt."""
    broken = json.loads(json.dumps(row))
    needed = {"instruction": ["instruction", "output"]}.get(form, list(row))
    name = rng.choice(needed)
    if form == "chat" and rng.random() < 0.7:
        turns = broken["messages"]
        rng.choice(
            [
                turns.pop,
                turns.clear,
                lambda: turns[-1].pop("content"),
                lambda: turns[0].pop("role"),
                lambda: turns[-1].update(content=5),
                lambda: turns[-1].update(content=""),
                lambda: turns[0].update(role="nobody"),
                lambda: turns.append("text"),
                lambda: turns.append(None),
                lambda: turns[-1].update(role="user"),
            ]
        )()
        return broken
    broken[name] = rng.choice([None, [], {}, "", "  \n", [None], {"a": [1]}])
    return broken


def planted(rng: random.Random) -> Case:
    """JSON lines of which some are broken: the others are read, and the broken ones counted."""
    form, rows = _real(rng)
    bad = set(rng.sample(range(len(rows)), rng.randint(1, min(3, len(rows)))))
    lines = []
    for number, row in enumerate(rows):
        if number in bad and rng.random() < 0.6:
            lines.append(_spoilt_line(rng, row, _line(rng, row)))
        else:
            lines.append(_line(rng, _spoilt_row(rng, form, row) if number in bad else row))
    left = [row for number, row in enumerate(rows) if number not in bad]
    more, content = packed(rng, b"\n".join(lines) + b"\n")
    return Case("planted", f"rows.jsonl{more}", content, left, len(bad), form)


# --- files changed anywhere


def _changed(rng: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at, which = rng.randrange(len(found) or 1), rng.randrange(7)
        if which <= 1 and found:
            found[at] ^= 1 << rng.randrange(8)
        elif which == 2 and found:
            found[at] = rng.randrange(256)
        elif which == 3:
            del found[at : at + rng.choice([1, 8, 100])]
        elif which == 4:
            found[at:at] = rng.choice([b"\0", b'"', b"\n", b"\r", b",", b"{", b"\xff" * 8, bytes(64), b"[" * 5000])
        elif which == 5:
            length = rng.choice([4, 8, 64])
            found[at : at + length] = rng.choice([b"\0", b"\xff", b"\x7f"]) * length
        else:
            found = found[:at]
    return bytes(found)


def changed(rng: random.Random) -> Case:
    """A file with bytes changed at random, before it was compressed or after."""
    case = whole(rng)
    if rng.random() < 0.3 and not case.name.endswith((".gz", ".zst")):
        more, content = packed(rng, _changed(rng, case.content))
        return Case("changed", case.name + more, content)
    return Case("changed", case.name, _changed(rng, case.content))


def _wide(rng: random.Random, num: int) -> bytes:
    """A row of thousands of columns."""
    name = rng.choice(["prompt", "c", "text "])
    return json.dumps({f"{name}{number}": "a" for number in range(num)}).encode()


def odd(rng: random.Random) -> Case:
    """What is no data file, or is one of another kind."""
    case = whole(rng)
    suffix = rng.choice([*WRITERS, ".jsonl.gz", ".csv.zst", ".parquet.gz", ".arrow.zst", ".ndjson", ".md"])
    content = rng.choice(
        [
            *(b"", b"\n", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"[", b"{}", b"[]", b"null", b" ", b"\n" * 10_000),
            *(b"PAR1", b"PAR1PAR1", b"ARROW1\0\0", b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(20), b"\x28\xb5\x2f\xfd"),
            *(rng.randbytes(200), b"a,a\n1,2\n", b"a\n", b'a,b\n"', b'"' * 5000, b"," * 5000, b"\r" * 100),
            *(b"PAR1" + bytes(8) + b"\xff\xff\xff\x7fPAR1", b"\xff\xff\xff\xff\xff\xff\xff\x7f" * 4, b"[" * 200_000),
            *(case.content.decode("latin-1").encode("utf-16"), case.content * 2, gzip.compress(case.content)),
            *(
                _wide(rng, 5000),
                b'{"' + b"x" * 100_000 + b'": 1}',
                ",".join(f"c{number}" for number in range(5000)).encode() + b"\n1",
                case.content,
                b"[" + b"{}," * 20_000 + b"{}]",
                b'{"a":' * 50_000,
                b'{"text": "' + b"x" * 3_000_000,
            ),
        ]
    )
    return Case("odd", f"rows{suffix}", content)


def make(rng: random.Random) -> Case:
    """One case."""
    way = rng.random()
    if way < 0.2:
        return whole(rng)
    if way < 0.5:
        return planted(rng)
    return changed(rng) if way < 0.9 else odd(rng)


# --- what has to come of a case


def _seen(path: Path) -> Rows | dict[int, Any] | None:
    """What another reader finds in a file: all rows, of JSON lines by number; None where there is none."""
    suffix = path.suffixes[0]
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        if path.suffix == ".zst" or suffix in {".txt", ".md", ".csv", ".tsv"}:
            return None
        if suffix in {".jsonl", ".ndjson"}:
            if isinstance(whole := _object(raw), list):
                return whole
            return {number: _object(line) for number, line in enumerate(raw.split(b"\n"), 1)}
        if suffix == ".json":
            return json.loads(raw.decode("utf-8-sig"))
        import pyarrow
        import pyarrow.parquet

        if suffix == ".parquet":
            return pyarrow.parquet.read_table(io.BytesIO(raw), use_threads=False).to_pylist()
        opener = pyarrow.ipc.open_file if raw.startswith(b"ARROW1") else pyarrow.ipc.open_stream
        return opener(raw).read_all().to_pylist()
    except Exception:  # noqa: BLE001  what it cannot read says nothing of what we read
        return None


def _object(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _no_nulls(value: Any) -> Any:
    """Without nulls of structs, which no row wrote; NaN as text, which equals itself."""
    if isinstance(value, dict):
        return {name: _no_nulls(of) for name, of in value.items() if of is not None}
    if isinstance(value, list):
        return [_no_nulls(of) for of in value]
    return repr(value) if isinstance(value, float) and math.isnan(value) else value


def _same(ours: Sequence[Any], theirs: Any, case: Case, path: Path) -> None:
    """Our rows are those that another reader finds."""
    if isinstance(theirs, dict):
        for row in ours:
            if theirs.get(int(row.where.rpartition(":")[2])) != row.fields:
                raise WrongSuccess(f"{path}: {row.where} was read as {str(row.fields)[:200]}")
    elif theirs is not None and not any(isinstance(row, Exception) for row in theirs):
        got, wanted = [_no_nulls(dict(row.fields)) for row in ours], [_no_nulls(row) for row in theirs]
        if got != wanted:
            raise WrongSuccess(f"{case.what} {path}: {str(got)[:300]} was read, not {str(wanted)[:300]}")


def _flat(rows: Rows) -> Rows:
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def check(case: Case, folder: Path, *, gate: bool) -> str:
    """Read a case by itself, then as a recipe's data. Raises where what comes of it is wrong."""
    from peftkit.api import check_data, load_recipe
    from peftkit.data.read import Row, read
    from peftkit.data.rows.ingest import LEFT_OUT, UNUSABLE_CHECKS
    from peftkit.errors import UserError
    from peftkit.prepare.facts import light_facts
    from peftkit.recipe.schema import Source
    from tests.rigs.chaos.watch import check_told

    path = folder / case.name
    path.write_bytes(case.content)
    try:
        found = list(read(Source(path=str(path)), where="data.train"))
    except UserError as error:
        check_told(error)
        if case.rows is not None:
            raise WrongSuccess(f"{case.what}: a file that can be read is refused: {error}") from None
        found = []
    rows = [each for each in found if isinstance(each, Row)]
    if case.what == "whole" and _flat([dict(row.fields) for row in rows]) != _flat(case.rows or []):
        raise WrongSuccess(f"{path}: {len(rows)} rows, not those that were written")
    seen = _seen(path) if found else None
    if len(rows) == len(found) or isinstance(seen, dict):
        _same(rows, seen, case, path)
    source = {
        "base": str(TINY),
        "method": "ia3",
        "data": {"train": str(path), "eval": None, "format": case.format, "waive": list(UNUSABLE_CHECKS)},
        "train": {"max_steps": 1},
    }
    verdict = "accepted"
    try:
        _, examples = light_facts(load_recipe(source))
        assert examples is not None
        kept, left = len(examples.train) + len(examples.eval), examples.tally.of(LEFT_OUT).count
        if kept + left != len(found):
            raise WrongSuccess(f"{path}: {len(found)} rows read, {kept} kept and {left} left out")
        if case.rows is not None and (kept, left) != (len(case.rows), case.num_bad):
            raise WrongSuccess(f"{path}: {kept} rows kept and {left} left out, not {len(case.rows)}, {case.num_bad}")
    except UserError as error:
        check_told(error)
        verdict = "refused"
        if case.rows:
            raise WrongSuccess(f"{path}: {len(case.rows)} good rows are refused: {error}") from None
    _unwaived(source, case, verdict)
    if gate:
        check_data(load_recipe(source))
    return verdict


def _unwaived(source: dict[str, Any], case: Case, verdict: str) -> None:
    """Without a waiver, a broken row stops the run."""
    from peftkit.api import load_recipe
    from peftkit.errors import UserError
    from peftkit.prepare.facts import light_facts
    from tests.rigs.chaos.watch import check_told

    try:
        light_facts(load_recipe({**source, "data": {**source["data"], "waive": []}}))
    except UserError as error:
        check_told(error)
        if case.what == "whole":
            raise WrongSuccess(f"a whole file is refused: {error}") from None
        return
    if case.num_bad:
        raise WrongSuccess(f"{case.num_bad} broken rows stop nothing")


def open_data(shared: Path) -> Run:
    """Ready to run cases: one of twelve is tokenized and judged by the data gate too."""
    os.environ["HF_HUB_OFFLINE"] = "1"

    def run(rng: random.Random, folder: Path) -> str:
        os.environ["PEFTKIT_CACHE"] = str(folder / "cache")
        return check(make(rng), folder, gate=rng.random() < 1 / 12)

    return run
