import csv
import io
import json
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.read.rows import Fault, File
from peftkit.data.read.sources import read_rows
from peftkit.data.read.texts import read_csv, read_json_array, read_json_lines, read_paragraphs, read_tsv
from peftkit.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=15)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=6)


def read(reader, content, **options):
    """What a reader makes of the content of a file called f."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(reader(File(path, "f"), **options))


def fault(found):
    assert isinstance(found, Fault)
    return f"{found.kind} {found.problem}"


@given(OBJECTS, st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]))
def test_json_lines_come_back_with_their_numbers(objects, escaped, end):
    text = end.join(json.dumps(value, ensure_ascii=escaped) for value in objects)
    found = read(read_json_lines, text)
    assert [row.fields for row in found] == objects
    step = end.count("\n")
    assert [row.where for row in found] == [f"f:{1 + step * number}" for number in range(len(objects))]


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]))
def test_json_arrays_come_back(objects, escaped, indent):
    found = read(read_json_array, json.dumps(objects, ensure_ascii=escaped, indent=indent))
    assert [row.fields for row in found] == objects
    assert [row.where for row in found] == [f"f row {number + 1}" for number in range(len(objects))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "malformed-rows f:2: got a line that is not JSON"),
        ("[1]", "malformed-rows f:2: got a list, expected one JSON object"),
        ('{"a": NaN}', "malformed-rows f:2: got the number NaN"),
        ('{"a": [-Infinity]}', "malformed-rows f:2: got the number -Infinity"),
        ('{"a": 1e999}', "malformed-rows f:2: got the number 1e999"),
        ('{"a": {"b": 1, "b": 2}}', "malformed-rows f:2: got the key 'b' twice"),
        ('{"a": ' + "[" * 100_000, "malformed-rows f:2: got a line that is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "malformed-rows f:2: got a line that is not JSON"),
        (r'{"a": "\ud800"}', r"encoding f:2: got half of a surrogate pair (\ud800)"),
        (r'{"\uDC00": 1}', r"encoding f:2: got half of a surrogate pair (\udc00)"),
        (b'{"a": "caf\xe9"}', "encoding f:2: got the byte 0xe9, expected UTF-8 text; convert the file to UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "encoding f:2: got the byte 0xed"),
        (b'{"a": "\0"}', "encoding f:2: got a NUL byte"),
        ('{"a": "' + "x" * 1000 + '"}', "malformed-rows f:2: got a line of"),
    ],
)
def test_a_bad_line_is_a_fault_and_the_others_are_read(line, said):
    bad = line if isinstance(line, bytes) else line.encode()
    limit = 500 if b"xxx" in bad else 2**20
    first, second, third = read(read_json_lines, b'{"a": 1}\n' + bad + b'\n{"a": "\\ud83d\\ude00"}', limit=limit)
    assert fault(second).startswith(said)
    assert (first.fields, third.fields) == ({"a": 1}, {"a": "\U0001f600"})


def test_json_arrays_with_bad_rows_and_bad_ends():
    found = read(read_json_array, r'[{"a": 1}, 2, {"a": NaN}, {"b": 1, "b": 2}, {"a": "\ud800"}, {"a": 2}]')
    assert [fault(each) for each in found[1:5]] == [
        "malformed-rows f row 2: got a int, expected one JSON object",
        "malformed-rows f row 3: got the number NaN, expected one JSON object; JSON has no NaN, and each key only once",
        "malformed-rows f row 4: got the key 'b' twice, expected one JSON object; "
        "JSON has no NaN, and each key only once",
        r"encoding f row 5: got half of a surrogate pair (\ud800), expected UTF-8 text; "
        "write the character itself",
    ]
    assert found[5].fields == {"a": 2}
    for text in ('[{"a": 1}', '[{"a": 1},]', '[{"a": 1}] x', '[{"a": 1} {}]', '{"a": 1}\n{"a": 2}', "["):
        with pytest.raises(UserError, match="not JSON"):
            read(read_json_array, text)
    assert fault(*read(read_json_array, b'[\n{"a": "\xe9"}]')).startswith("encoding f:2: got the byte 0xe9")
    assert fault(*read(read_json_array, "[]".encode("utf-16"))).startswith("encoding f:1: got a file in UTF-16")
    assert read(read_json_array, "\ufeff[ ] ") == []


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS), max_size=6), st.sampled_from([",", "\t"]))
def test_tables_come_back_with_the_lines_where_rows_begin(rows, delimiter):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    begins = []
    for row in [("a", "b"), *rows]:
        begins.append(out.getvalue().count("\n") + 1)
        writer.writerow(row)
    found = read(read_csv, out.getvalue(), delimiter=delimiter)
    assert [tuple(row.fields.values()) for row in found] == rows
    assert [row.where for row in found] == [f"f:{line}" for line in begins[1:]]


def test_tables_with_bad_rows():
    text = b'a,b\r\n1,2\r\n3\r\ncaf\xe9,4\r\n"5" x,6\r\n\r\n7,"8\r\n8"\r\n9,"never closed\r\nx,y\r\n'
    good, short, byte, quotes, two, unclosed = read(read_csv, text)
    assert (good.fields, two.fields, two.where) == ({"a": "1", "b": "2"}, {"a": "7", "b": "8\r\n8"}, "f:7")
    assert fault(short).startswith("malformed-rows f:3: got 1 cells, expected 2")
    assert fault(byte).startswith("encoding f:4: got the byte 0xe9")
    assert fault(quotes).startswith("malformed-rows f:5: got quotes that do not match")
    assert fault(unclosed).startswith("malformed-rows f:9: got quotes that do not match")
    assert "up to line 10" in fault(unclosed)


def test_lines_that_end_in_carriage_returns_alone():
    with pytest.raises(UserError, match="f:1: got a carriage return that ends no line"):
        read(read_csv, "a,b\r1,2\r")


def test_a_quote_that_never_closes_swallows_no_more_than_the_limit():
    text = 'a,b\n1,"x\n' + "1,2\n" * 100
    swallowed, *others = read(read_csv, text, limit=45)
    assert fault(swallowed).startswith("malformed-rows f:2: got a record of more than 45 bytes, up to line 13")
    assert len(others) == 89
    assert (others[0].where, others[0].fields) == ("f:14", {"a": "1", "b": "2"})
    long, good = read(read_csv, "a\n" + "x" * 100 + "\n1\n", limit=45)
    assert fault(long).startswith("malformed-rows f:2: got a line of 101 bytes")
    assert good.fields == {"a": "1"}


def test_headers():
    assert [row.fields for row in read(read_tsv, "\n\nb\tc\n1\t2\n")] == [{"b": "1", "c": "2"}]
    assert read(read_csv, "") == []
    with pytest.raises(UserError, match="f:1: got the column 'a' twice"):
        read(read_csv, "a,b,a\n1,2,3\n")
    with pytest.raises(UserError, match="f:1: got the byte 0xe9"):
        read(read_csv, b"caf\xe9,b\n1,2\n")
    assert fault(*read(read_csv, "a\tb\n".encode("utf-16"))).startswith("encoding f:1: got a file in UTF-16")


def test_paragraphs():
    found = read(read_paragraphs, b"one\r\ntwo\r\n\r\n \n\ncaf\xe9\nfour\n\nlast")
    assert (found[0].fields["text"], found[0].where) == ("one\ntwo", "f:1")
    assert fault(found[1]).startswith("encoding f:6: got the byte 0xe9")
    assert (found[2].fields["text"], found[2].where) == ("last", "f:9")
    long, short = read(read_paragraphs, "line\n" * 100 + "\nshort\n", limit=50)
    assert fault(long).startswith("malformed-rows f:1: got a paragraph of more than 50 bytes")
    assert short.fields == {"text": "short"}
    assert fault(*read(read_paragraphs, "x".encode("utf-16"))).startswith("encoding")


@given(st.lists(st.lists(TEXT.filter(lambda t: t.strip() and not set(t) & set("\n\r\0")), min_size=1)))
def test_paragraphs_come_back(blocks):
    texts = ["\n".join(block) for block in blocks]
    found = read(read_paragraphs, "\n\n\n".join(texts).removeprefix("\ufeff"))
    assert [row.fields["text"] for row in found] == [
        text.removeprefix("\ufeff") if number == 0 else text for number, text in enumerate(texts)
    ]


def test_thousands_of_names_are_compared_at_once():
    names = [f"name{number}" for number in range(50_000)]
    begin = time.monotonic()
    with pytest.raises(UserError, match="the column 'name7' twice"):
        read(read_csv, ",".join([*names, "name7"]) + "\n1\n")
    line = "{" + ", ".join(f'"{name}": 1' for name in [*names, "name49999"]) + "}"
    assert "the key 'name49999' twice" in fault(*read(read_json_lines, line))
    assert time.monotonic() - begin < 5


TABLE = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]
OBJECTS = {
    "a list under a key": ({"version": 1, "data": TABLE}, "data row 3"),
    "columns as lists": ({name: [row[name] for row in TABLE] for name in TABLE[0]}, "columns row 3"),
    "columns as pandas writes them": (
        {name: {str(i): row[name] for i, row in enumerate(TABLE)} for name in TABLE[0]},
        "columns row 3",
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_that_holds_the_rows_is_read(name, tmp_path):
    value, place = OBJECTS[name]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value))
    rows = read_rows([str(path)], where="data.train")
    assert [dict(row.fields) for row in rows] == TABLE
    assert rows[2].where == f"{path} {place}"


def test_an_indented_array_named_jsonl_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n " + json.dumps(TABLE, indent=2))
    assert [dict(row.fields) for row in read_rows([str(path)], where="data.train")] == TABLE
    path.write_text(json.dumps(TABLE, indent=2)[:-20])
    with pytest.raises(UserError) as caught:
        read_rows([str(path)], where="data.train")
    assert len(caught.value.problems) == 1, "one cause, one problem"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"train": TABLE, "test": TABLE}, "lists of rows under train, test"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "put it in a list"),
        ({"prompt": "q", "completion": "a"}, "put it in a list"),
        ({"a": [1, 2], "b": [1]}, "an object with a, b"),
        ({}, "an object"),
        ({"r1": TABLE[0], "r2": TABLE[1]}, "an object with r1, r2"),
        ({"prompt": {"0": "q", "1": "r"}, "completion": {"0": "a"}}, "an object with prompt, completion"),
        ({"columns": ["a", "b"], "index": [0, 1], "data": [[1, 2], [3, 4]]}, "an object with columns"),
        ({"data": [{"a": 1}, None]}, "an object with data"),
        ({"text": "a long document", "entities": TABLE}, "an object with text, entities"),
        ({"prompt": "q", "meta": {"a": 1}, "tools": TABLE}, "an object with prompt, meta, tools"),
        ({"train": TABLE, "more": [{"a": 1}, None]}, "an object with train, more"),
        ({"a": {"9" * 5000: 1}}, "an object with a"),
        (7, "a int"),
    ],
)
def test_another_object_is_refused(value, said, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=said):
        read_rows([str(path)], where="data.train")


@pytest.mark.parametrize(
    "value", [{"data": TABLE, "info": {"a": 1}, "note": "two words"}, {"rows_of_mine": TABLE, "version": "1.0", "n": 2}]
)
def test_rows_beside_what_describes_them_are_read(value, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value))
    assert [dict(row.fields) for row in read_rows([str(path)], where="data.train")] == TABLE


def test_the_text_of_an_object_is_looked_through_once(tmp_path):
    """It took time in the square of the rows when each row searched the whole text."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"prompt": ["a" * 400] * 20_000, "completion": ["b"] * 20_000}))
    assert len(read_rows([str(path)], where="data.train")) == 20_000
    path.write_text('{"prompt": ["a", "\\\\ud800"], "completion": ["b", "c"]}'.replace("\\\\", "\\"))
    first, second = read(read_json_array, path.read_text())
    assert (dict(first.fields)["prompt"], isinstance(second, Fault)) == ("a", True)


def test_cells_by_number_are_aligned_and_rows_with_a_role_are_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"prompt": {"0": "q0", "1": "q1"}, "completion": {"1": "a1", "0": "a0"}}))
    rows = [dict(row.fields) for row in read_rows([str(path)], where="data.train")]
    assert rows == [{"prompt": "q0", "completion": "a0"}, {"prompt": "q1", "completion": "a1"}]
    path.write_text(json.dumps({"data": [{"from": "hello", "to": "bonjour", "role": "x"}]}))
    assert [dict(row.fields)["to"] for row in read_rows([str(path)], where="data.train")] == ["bonjour"]


def test_a_list_on_the_first_of_several_lines_is_a_broken_row():
    first, second = read(read_json_lines, '[{"a": 1}]\n{"a": 2}\n')
    assert (isinstance(first, Fault), dict(second.fields)) == (True, {"a": 2})
    for text, rows in (('[{"a": 1}]\n\n', [{"a": 1}]), ('[{"a": [1]},\n{"a": [2]}]\n', [{"a": [1]}, {"a": [2]}])):
        assert [dict(row.fields) for row in read(read_json_lines, text)] == rows


def test_a_log_line_before_the_rows_is_one_bad_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('[INFO] started\n{"a": 1}\n')
    with pytest.raises(UserError) as caught:
        read_rows([str(path)], where="data.train")
    [problem] = caught.value.problems
    assert problem.where == f"{path}:1"
