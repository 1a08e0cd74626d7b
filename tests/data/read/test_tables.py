import datetime as dt
import gzip
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest

from peftkit.data.read.rows import Fault, File
from peftkit.data.read.tables import read_arrow, read_parquet
from peftkit.errors import UserError


def read(reader, path):
    return list(reader(File(path, "f")))


def as_parquet(table, path):
    pyarrow.parquet.write_table(table, path, row_group_size=50)
    return read(read_parquet, path)


def as_file(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return read(read_arrow, path)


def as_stream(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return read(read_arrow, path)


KINDS = pytest.mark.parametrize("through", [as_parquet, as_file, as_stream])


@KINDS
def test_rows_in_order_over_many_batches(tmp_path, through):
    found = through(pa.table({"text": [f"row {number}" for number in range(500)]}), tmp_path / "a")
    assert [row.fields["text"] for row in found] == [f"row {number}" for number in range(500)]
    assert (found[0].where, found[-1].where) == ("f row 1", "f row 500")


@KINDS
def test_every_value_has_a_json_form(tmp_path, through):
    moment = dt.datetime(2024, 2, 29, 12, 30, 5, 250_000)
    turns = [[{"role": "user", "content": "hi"}]]
    table = pa.table(
        {
            "turns": turns,
            "day": [dt.date(2024, 2, 29)],
            "at": pa.array([moment], pa.timestamp("ns")),
            "zoned": pa.array([moment], pa.timestamp("us", "UTC")),
            "times": pa.array([[dt.time(1, 2, 3)]], pa.list_(pa.time64("ns"))),
            "took": pa.array([dt.timedelta(seconds=90)], pa.duration("ns")),
            "price": [Decimal("1.50")],
            "map": pa.array([[("a", moment), ("b", None)]], pa.map_(pa.string(), pa.timestamp("us"))),
            "class": pa.array(["x"]).dictionary_encode(),
            "deep": pa.array([{"list": [{"at": moment}]}]),
            "none": pa.nulls(1),
            "half": pa.array([1.5], pa.float16()),
        }
    )
    [row] = through(table, tmp_path / "a")
    assert (
        json.loads(json.dumps(row.fields))
        == row.fields
        == {
            "turns": turns[0],
            "day": "2024-02-29",
            "at": "2024-02-29T12:30:05.250000",
            "zoned": "2024-02-29T12:30:05.250000+00:00",
            "times": ["01:02:03"],
            "took": "PT90.0S",
            "price": "1.50",
            "map": {"a": "2024-02-29T12:30:05.250000"},  # nulls of structs and maps: no row wrote them
            "class": "x",
            "deep": {"list": [{"at": "2024-02-29T12:30:05.250000"}]},
            "none": None,
            "half": 1.5,
        }
    )


@KINDS
def test_rows_without_a_json_form_are_faults(tmp_path, through):
    table = pa.table(
        {
            "n": [1, 2, 3, 4],
            "image": pa.array([None, {"bytes": b"\x89PNG"}, None, None]),
            "day": pa.array([1, 2, 10**13, 4], pa.timestamp("s")),
            "map": pa.array([[], [], [], [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())),
        }
    )
    good, binary, late, twice = through(table, tmp_path / "a")
    assert good.fields["n"] == 1
    assert all(isinstance(each, Fault) and each.kind == "malformed-rows" for each in (binary, late, twice))
    assert str(binary.problem).startswith("f row 2: got a binary column image, expected text")
    assert str(late.problem).startswith("f row 3: got a value that cannot be read")
    assert str(twice.problem).startswith("f row 4: got a value that cannot be read")


@KINDS
def test_wrong_utf8_is_a_fault_of_its_row(tmp_path, through):
    raw = pa.array([b"one", b"caf\xe9", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    one, two, three = through(pa.table({"text": text}), tmp_path / "a")
    assert (one.fields, three.fields) == ({"text": "one"}, {"text": "three"})
    assert (two.kind, two.problem.where, two.problem.got) == ("encoding", "f row 2", "the byte 0xe9")


def test_columns_of_one_name(tmp_path):
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(UserError, match="the column 'a' twice"):
        as_file(table, tmp_path / "a")


@pytest.mark.parametrize("reader", [read_parquet, read_arrow])
def test_files_of_another_kind_are_named(tmp_path, reader):
    kind = {read_parquet: "Parquet", read_arrow: "Arrow"}[reader]
    for number, (content, said) in enumerate(
        [
            (b"", f"not {kind}, or is damaged"),
            (b'{"text": "x"}\n' * 10, f"not {kind}, or is damaged"),
            (gzip.compress(b"x" * 100, mtime=0), f"not {kind} but gzip"),
            (b"PAR1" + bytes(100) if reader is read_arrow else b"ARROW1" + bytes(100), f"not {kind} but "),
        ]
    ):
        path = tmp_path / str(number)
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            read(reader, path)


@pytest.mark.parametrize("through", [as_parquet, as_file, as_stream])
def test_a_file_cut_short_is_told(tmp_path, through):
    path = tmp_path / "a"
    through(pa.table({"text": ["some text"] * 1000}), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged"):
        read(read_parquet if through is as_parquet else read_arrow, path)


def test_compressed_tables(tmp_path):
    table = pa.table({"text": ["x", "y"]})
    as_parquet(table, tmp_path / "a.parquet")
    as_file(table, tmp_path / "a.arrow")
    for reader, name in ((read_parquet, "a.parquet"), (read_arrow, "a.arrow")):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert [row.fields["text"] for row in read(reader, packed)] == ["x", "y"]


@pytest.mark.parametrize("through", [as_file, as_stream])
def test_offsets_that_point_astray_are_told_before_they_are_followed(tmp_path, through):
    offsets = pa.array([0, 2, 2**30, 6], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abcdef")])
    with pytest.raises(UserError, match="damaged"):
        through(pa.table({"text": text}), tmp_path / "a")


def test_a_flipped_byte_is_seen_where_pages_have_checksums(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ["abcdefgh" * 20]})
    pyarrow.parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_page_checksum=True, write_statistics=False
    )
    content = bytearray(path.read_bytes())
    content[content.index(b"abcdefgh") + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        list(read_parquet(File(path, "f")))
