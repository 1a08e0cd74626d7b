import gzip
import io
import time

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.read.rows import File
from peftkit.data.read.streams import (
    check_encoding,
    open_decompressed,
    read_lines,
    split_suffixes,
    translate_read_errors,
)
from peftkit.errors import UserError


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def file(path, content):
    path.write_bytes(content)
    return File(path, str(path))


def content(found):
    with translate_read_errors(found), open_decompressed(found) as stream:
        return stream.read()


def cut(data, limit=100):
    return list(read_lines(io.BufferedReader(io.BytesIO(data)), "f", limit))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("rows.jsonl", (".jsonl", "")),
        ("ROWS.CSV.GZ", (".csv", ".gz")),
        ("a.b.json.zst", (".json", ".zst")),
        ("rows.gz", ("", ".gz")),
        ("rows.tar.gz", (".tar", ".gz")),
    ],
)
def test_what_a_name_says(tmp_path, name, parts):
    assert split_suffixes(tmp_path / name) == parts


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_compressed_files_in_several_parts(tmp_path, suffix, pack):
    data = b"line\n" * 1000
    assert content(file(tmp_path / f"a.txt{suffix}", pack(data) + pack(data))) == 2 * data
    assert content(file(tmp_path / f"b.txt{suffix}", b"")) == b""


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_compressed_files_that_are_damaged_or_none(tmp_path, suffix, pack):
    whole = pack(bytes(range(256)) * 1000)
    with pytest.raises(UserError, match="cannot be read to its end"):
        content(file(tmp_path / f"a.txt{suffix}", whole[:-20]))
    with pytest.raises(UserError, match="was it decompressed already"):
        content(file(tmp_path / f"b.txt{suffix}", b"plain text\n"))
    with pytest.raises(UserError, match="but zip"):
        content(file(tmp_path / f"c.txt{suffix}", b"PK\x03\x04" + bytes(20)))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"PAR1", "Parquet"),
        (b"ARROW1\0\0", "Arrow"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "zip"),
    ],
)
def test_suffixes_that_lie(tmp_path, head, kind):
    found = file(tmp_path / "a.jsonl", head + bytes(50))
    with pytest.raises(UserError, match=f"content that is {kind}"), open_decompressed(found) as stream:
        check_encoding(found, stream)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_wide_text_is_named(tmp_path, encoding):
    text = "\ufeff{}" if encoding.endswith("be") else "{}"
    found = file(tmp_path / "a.jsonl", text.encode(encoding))
    with open_decompressed(found) as stream:
        fault = check_encoding(found, stream)
    assert fault.kind == "encoding"
    assert f"{{path: {found.name}, encoding: {encoding[:6]}}}" in fault.problem.fix


@given(st.lists(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=20)))
def test_lines_are_those_of_the_text(texts):
    found = cut("".join(text + "\n" for text in texts).encode())
    assert [line.number for line in found] == list(range(1, len(texts) + 1))
    expected = [text + "\n" for text in texts]
    if expected:
        expected[0] = expected[0].removeprefix("\ufeff")
    assert [line.text for line in found] == expected


@given(st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line)), st.integers(1, 30))
def test_every_line_is_told_or_read_whatever_its_bytes(texts, limit):
    data = b"".join(text + b"\n" for text in texts)
    found = cut(data, limit)
    assert sum(line.num_bytes for line in found) == len(data)
    assert len(found) == len(texts)
    assert all(
        (line.fault is None) == (0 not in text and _is_text(text) and len(text) <= limit)
        for line, text in zip(found, texts, strict=True)
    )


def _is_text(raw):
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_what_a_faulty_line_is_called():
    short, long, bad, null, last = cut(b"a\n" + b"x" * 500 + b"\ncaf\xe9\nn\0l\nlast")
    assert (short.fault, short.text, last.fault, last.text) == (None, "a\n", None, "last")
    assert (long.fault.kind, long.fault.problem.got) == ("malformed-rows", "a line of 501 bytes")
    assert (bad.fault.kind, bad.fault.problem.where, bad.fault.problem.got) == ("encoding", "f:3", "the byte 0xe9")
    assert (null.fault.kind, null.fault.problem.got) == ("encoding", "a NUL byte")


class Endless(io.RawIOBase):
    """200 MB of one line, made as it is read."""

    left = 200 * 2**20

    def readable(self):
        return True

    def readinto(self, buffer):
        taken = min(len(buffer), self.left)
        buffer[:taken] = b"x" * taken
        self.left -= taken
        return taken


def test_a_huge_line_is_told_in_flat_memory():
    import tracemalloc

    tracemalloc.start()
    begun = time.perf_counter()
    [line] = read_lines(io.BufferedReader(Endless(), 2**20), "f", 2**22)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert line.fault.problem.got == "a line of 209,715,200 bytes"
    assert peak < 3 * 2**22
    assert time.perf_counter() - begun < 5
