import gzip

import pytest

from peftkit.data.read import read_rows
from peftkit.errors import UserError


def read(path):
    return read_rows([str(path)], where="recipe.yaml:5 data.train")


def refuse(path):
    with pytest.raises(UserError) as caught:
        read(path)
    return str(caught.value)


def test_jsonl_keeps_line_numbers_past_blank_lines_and_bom(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"text": "one"}\n\n{"text": "two\\u2028"}\n')
    rows = read(path)
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert rows[1].fields == {"text": "two\u2028"}


def test_all_malformed_lines_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{broken\n[1]\n')
    said = refuse(path)
    assert f"{path}:2: got a line that is not JSON" in said
    assert f"{path}:3: got a list" in said


def test_many_malformed_lines_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("x\n" * 100)
    assert "80 more malformed lines" in refuse(path)


def test_csv_and_tsv(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n"two\nlines",x\ny,"a, b"\n')
    rows = read(tmp_path / "a.csv")
    assert rows[1].fields == {"prompt": "y", "completion": "a, b"}
    assert [row.where[-2:] for row in rows] == [":2", ":4"]
    (tmp_path / "a.tsv").write_text("text\tn\nhello\t1\n")
    assert read(tmp_path / "a.tsv")[0].fields == {"text": "hello", "n": "1"}
    (tmp_path / "b.csv").write_text("a,b\n1,2\n3\n")
    assert "b.csv:3: got 1 cells, expected 2" in refuse(tmp_path / "b.csv")


def test_large_cells_and_deep_lines(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read(tmp_path / "a.csv")[0].fields["text"]) == 200_000
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    assert "a.jsonl:1" in refuse(tmp_path / "a.jsonl")


def test_json_parquet_and_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.json").write_text('[{"text": "x"}]')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("first\nparagraph\n\n\nsecond\n")
    assert [r.fields for r in read(tmp_path / "a.json")] == [{"text": "x"}]
    assert [r.fields["text"] for r in read(tmp_path / "a.parquet")] == ["x", "y"]
    text = read(tmp_path / "a.txt")
    assert [(r.fields["text"], r.where[-2:]) for r in text] == [("first\nparagraph", ":1"), ("second", ":5")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.csv", b"a,b\n", "no rows"),
        ("a.json", b"{}", "expected a list of objects"),
        ("a.json", b"{", "not JSON"),
        ("a.parquet", b"not parquet", "not Parquet"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "0xe9"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "0x8b"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said in refuse(tmp_path / name)


def test_missing_files_say_where_was_looked(tmp_path, monkeypatch):
    assert "which does not exist" in refuse(tmp_path / "none.jsonl")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    assert "paths in a recipe are relative to the recipe" in refuse(tmp_path / "rows.jsonl")


def test_hub_data_while_offline_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "while HF_HUB_OFFLINE is set" in refuse("org/dataset")
