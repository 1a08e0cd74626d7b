import gzip
import json
import subprocess
import sys

import pytest

from peftkit.data.read import Fault, Row, content_key, read, read_rows
from peftkit.errors import UserError
from peftkit.recipe.schema import Source


def key(path):
    return content_key(Source(path=str(path)), where="data.train")


def test_rows_come_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n' * 3)
    found = read(Source(path=str(path)), where="data.train")
    assert next(found) == Row({"n": 1}, f"{path}:1")
    assert len(list(found)) == 2


def test_a_missing_source_is_told_before_the_first_row(tmp_path):
    with pytest.raises(UserError, match=r"data.train: got .*none.jsonl, which does not exist"):
        read(Source(path=str(tmp_path / "none.jsonl")), where="data.train")


def test_faults_are_yielded_in_place_of_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n{\ncaf\xe9\n{"n": 2}\n')
    (tmp_path / "b.csv").write_text("n\n3\n")
    found = list(read(Source(path=str(tmp_path)), where="data.train"))
    assert [row.kind if isinstance(row, Fault) else row.fields["n"] for row in found] == [
        1, "malformed-rows", "encoding", 2, "3",
    ]  # fmt: skip


def test_no_rows_is_an_error_of_the_whole_source_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        list(read(Source(path=str(tmp_path)), where="data.train"))
    (tmp_path / "b.jsonl").write_text("{}")
    assert len(list(read(Source(path=str(tmp_path)), where="data.train"))) == 1


def test_problems_of_all_sources_are_told_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n" * 30)
    with pytest.raises(UserError) as caught:
        read_rows([str(tmp_path / "a.jsonl"), str(tmp_path / "none.csv")], where="data.train")
    assert len(caught.value.problems) == 22
    assert "10 more malformed lines" in str(caught.value)
    assert "none.csv, which does not exist" in str(caught.value)


def test_the_key_is_of_content_order_and_names(tmp_path):
    for folder, files in {"one": ("a", "b"), "same": ("c", "d"), "other": ("b", "a"), "joined": ("a",)}.items():
        (tmp_path / folder).mkdir()
        for name in files:
            text = {"a": "1\n", "b": "2\n", "c": "1\n", "d": "2\n"}[name]
            text = "1\n2\n" if folder == "joined" else text
            (tmp_path / folder / f"{files.index(name)}{name}.txt").write_text(text)
    assert len({key(tmp_path / name) for name in ("one", "same", "other", "joined")}) == 4
    assert len(key(tmp_path / "one")) == 64


PROGRAM = """
import resource, sys
from peftkit.data.read import read
from peftkit.recipe.schema import Source
read(Source(path=sys.argv[2]), where="")
for row in read(Source(path=sys.argv[2]), where=""): pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for row in read(Source(path=sys.argv[1]), where="")))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv", ".txt", ".parquet"])
def test_memory_does_not_grow_with_the_data(tmp_path, suffix):
    """60 MB are read in what one row takes, and a few pieces."""
    rows, text = 30_000, "word " * 400
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    for path, number in ((small, 100), (large, rows)):
        if suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.table({"text": [f"{n} {text}" for n in range(number)]})
            pyarrow.parquet.write_table(table, path, row_group_size=1000, use_dictionary=False)
            continue
        begin, end = {".csv": ("text\n", "\n"), ".txt": ("", "\n\n")}.get(suffix, ("", "\n"))
        row = json.dumps({"text": text}) if "json" in suffix else text
        content = (begin + (row + end) * number).encode()
        path.write_bytes(gzip.compress(content, 1) if suffix.endswith(".gz") else content)
    done = subprocess.run([sys.executable, "-c", PROGRAM, large, small], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == rows
    assert grown < 16 * 1024


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".jsonl.gz"])
@pytest.mark.parametrize("encoding", ["windows-1252", "utf-16", "shift_jis", "gb18030"])
def test_an_encoding_that_is_named_is_read(tmp_path, suffix, encoding):
    word = {"shift_jis": "\u65e5\u672c", "gb18030": "\u4f60\u597d"}.get(encoding, "caf\xe9")
    line = json.dumps({"text": word}, ensure_ascii=False)
    text = {".csv": f"text\n{word}\n", ".txt": f"{word}\n", ".json": f"[{line}]"}.get(suffix, f"{line}\n")
    raw = text.encode(encoding)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    [row] = read(Source(path=str(path), encoding=encoding), where="data.train")
    assert row.fields["text"].strip() == word


def test_an_encoding_that_is_wrong_or_has_no_effect_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(UserError, match="bytes that are no ascii"):
        list(read(Source(path=str(tmp_path / "a.txt"), encoding="ascii"), where="data.train"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="the format has its own"):
        read(Source(path=str(tmp_path / "a.parquet"), encoding="ascii"), where="data.train")
    for name in ("hex", "no-such"):
        with pytest.raises(ValueError, match="an encoding of text is expected"):
            Source(path="a.txt", encoding=name)
    one = content_key(Source(path=str(tmp_path / "a.txt")), where="data.train")
    assert one != content_key(Source(path=str(tmp_path / "a.txt"), encoding="latin-1"), where="data.train")
