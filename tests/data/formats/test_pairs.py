import pytest

from peftkit.data.formats import BadRow, detect_format, select_reader
from peftkit.data.formats.columns import make_renamer
from peftkit.data.read import Row
from peftkit.errors import UserError


def one(fields):
    row = Row(fields, "w")
    return select_reader(row, "auto")[1](row)


def test_questions_with_answers_are_chats():
    example = one({"question": "1+1?", "answer": "2", "context": "Sums."})
    assert [m["content"] for m in example.messages] == ["Sums.\n\n1+1?", "2"]


def test_sources_with_targets_are_prompts_with_completions():
    example = one({"source": "hallo", "target": "hello"})
    assert (example.prompt, example.completion) == ("hallo", "hello")


def test_the_first_format_whose_columns_are_there_is_taken():
    assert detect_format([Row({"prompt": "a", "chosen": "b", "rejected": "c"}, "w")]) == "preference"
    assert detect_format([Row({"text": "a", "label": 1}, "w")]) == "classification"
    assert detect_format([Row({"text": "a"}, "w")]) == "text"


def test_a_jinja_line_makes_a_column():
    first = Row({"title": "Sums", "body": "1+1", "result": 2}, "w")
    rename = make_renamer({"prompt": "{{ title }}: {{ body }}", "completion": "{{ result }}"}, first)
    assert rename(first).fields == {
        "title": "Sums", "body": "1+1", "result": 2, "prompt": "Sums: 1+1", "completion": "2",
    }  # fmt: skip
    with pytest.raises(BadRow, match="cannot render"):
        rename(Row({"title": "x"}, "w"))
    with pytest.raises(UserError, match="a Jinja template"):
        make_renamer({"prompt": "{{ title "}, first)
    with pytest.raises(UserError, match="no filter 'uper'"):
        make_renamer({"prompt": "{{ title | uper }}"}, first)
    with pytest.raises(UserError, match="no filter 'defined'"):
        make_renamer({"prompt": "{{ title | defined }}"}, first)


def test_a_line_is_data_and_not_code():
    first = Row({"a": "x"}, "w")
    rename = make_renamer({"text": "{{ a.__class__.__mro__ }}"}, first)
    with pytest.raises(BadRow, match="cannot render"):
        rename(first)


def test_what_is_no_text_is_never_written_as_python_does():
    first = Row({"a": ["x"], "b": None}, "w")
    for line in ("{{ a }}", "{{ b }}"):
        with pytest.raises(BadRow, match="cannot render"):
            make_renamer({"text": line}, first)(first)
    assert make_renamer({"text": "{{ a | join }}"}, first)(first).fields["text"] == "x"
    with pytest.raises(BadRow, match="context is dict"):
        one({"question": "q", "answer": "a", "context": {"title": ["t"]}})
    with pytest.raises(BadRow, match="input is list"):
        one({"instruction": "q", "output": "a", "input": ["t"]})


def test_weights_of_tables_are_text():
    assert one({"source": "a", "target": "b", "weight": "0.5"}).weight == 0.5
    assert one({"source": "a", "target": "b", "weight": None}).weight == 1.0
    with pytest.raises(BadRow, match="the weight 'heavy'"):
        one({"source": "a", "target": "b", "weight": "heavy"})


def test_thousands_of_columns_are_told_in_few_words():
    row = Row({f"{'x' * 1000}{number}": 1 for number in range(10_000)}, "w")
    with pytest.raises(UserError, match="9,980 more") as caught:
        detect_format([row])
    assert len(str(caught.value)) < 5000
    with pytest.raises(UserError, match="9,980 more") as caught:
        make_renamer({"prompt": "no such"}, row)
    assert len(str(caught.value)) < 5000
