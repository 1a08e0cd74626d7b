import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.errors import UserError
from peftkit.recipe.document import dump_text, parse_text, parse_value, read_document


def refuse(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_text(text, name="r.yaml")
    return str(caught.value)


def test_lines_of_keys():
    document = parse_text("base: x\nmethod:\n  name: lora\n  rank: 8\n", name="r.yaml")
    assert document.data == {"base": "x", "method": {"name": "lora", "rank": 8}}
    assert document.lines[("method", "rank")] == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5.0e-4", 5e-4),
        ("1_000", 1000),
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("", None),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("'8'", "8"),
        ("[q, v]", ["q", "v"]),
        ("5%", "5%"),
        (".inf", float("inf")),
        ("-3", -3),
    ],
)
def test_values_are_typed_as_yaml_1_2(text, value):
    assert parse_value(text) == value


@given(st.integers() | st.floats(allow_nan=False) | st.booleans())
def test_numbers_round_trip(value):
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("inf", ".inf")
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "an empty file"),
        ("# only a comment\n", "an empty file"),
        ("- a\n- b\n", "a list"),
        ("just text", "a single value"),
        ("a: 1\nb:\n\tc: 2\n", "r.yaml:3: got a tab"),
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: got the key a again"),
        ("a: !!python/object/apply:os.system [id]\n", "r.yaml:1: got the tag !!python/object/apply:os.system"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "merge key"),
        ("a: [1, 2\n", "not YAML"),
    ],
)
def test_bad_text_is_told_with_its_line(text, said):
    assert said in refuse(text)


def test_alias_bomb_is_refused():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
    )
    assert "aliases" in refuse(bomb)


def test_deep_nesting_is_refused():
    assert "too deep" in refuse("a: " + "[" * 5000 + "]" * 5000)


def test_self_reference_is_refused():
    assert refuse("a: &x [*x]\n")


simple = st.text(max_size=12) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()


@given(st.dictionaries(st.text(min_size=1, max_size=8), simple | st.lists(simple, max_size=3), max_size=5))
def test_what_is_dumped_is_read_back(data):
    if data:
        assert parse_text(dump_text(data), name="r.yaml").data == data


@pytest.mark.parametrize("text", ["12345e67", "1e-4", "off", "null", "1_000", "12:30", "~", "5%", "<<"])
def test_texts_that_look_like_something_else_stay_texts(text):
    assert parse_text(dump_text({"a": text}), name="r.yaml").data == {"a": text}


def test_all_problems_at_once():
    text = refuse("a: 1\na: 2\nb: !!python/name:os.system x\n")
    assert "a again" in text
    assert "tag" in text


def test_files_that_cannot_be_recipes(tmp_path):
    (tmp_path / "good.yaml").write_text("a: 1")
    for path, said in ((tmp_path, "a folder"), (tmp_path / "god.yaml", "there is: good.yaml")):
        with pytest.raises(UserError, match=said):
            read_document(path)
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin.yaml:2: got the byte 0xe9"):
        read_document(tmp_path / "latin.yaml")


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_refused(text):
    try:
        assert isinstance(parse_text(text, name="r.yaml").data, dict)
    except UserError as error:
        assert error.problems


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: " + "9" * 5000, "r.yaml:2: got a number of 5,000 digits"),
        ('a: "\\U00110000"', "not YAML"),
        ("a: !!int abc", "r.yaml:1: got the tag !!int"),
        ("a: !!bool maybe", "the tag !!bool"),
        ("a: !!str 5", "the tag !!str"),
        ("a: ! 5", "the tag !,"),
        ("!!python/name:os.system a: 5", "the tag !!python/name:os.system"),
        ("a: 1\x1f", "not YAML"),
        ("%YAML " + "1" * 5000 + ".1\n--- {a: 1}", "not YAML"),
    ],
)
def test_what_fuzzing_found_is_refused(text, said):
    assert said in refuse(text)
    assert len(refuse(text)) < 500


@pytest.mark.parametrize(
    ("text", "value"), [("0x1F", 31), ("0o17", 15), ("017", 17), ("1\u0663", "1\u0663"), ("'<<'", "<<")]
)
def test_numbers_are_ascii_and_yaml_1_2s(text, value):
    assert parse_value(text) == value
    assert parse_text(f"a: {text}", name="r.yaml").data == {"a": value}


def test_a_quoted_merge_key_is_a_key():
    assert parse_text("'<<': 1", name="r.yaml").data == {"<<": 1}


@pytest.mark.parametrize("text", ["a: [" + "b, " * 300_000 + "]", "".join(f"k{i}: 1\n" for i in range(90_000))])
def test_a_megabyte_of_values_is_refused_at_once(text):
    begin = time.monotonic()
    assert "more than 10000 values" in refuse(text)
    assert time.monotonic() - begin < 5


def test_a_device_without_end_is_no_recipe():
    with pytest.raises(UserError, match="more than 1,000,000 bytes"):
        read_document(Path("/dev/zero"))
