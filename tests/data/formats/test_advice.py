"""Advised columns read the rows that they are advised for."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.formats import rename, select_reader, to_examples
from peftkit.data.formats.advice import advise_columns
from peftkit.data.read import Row
from peftkit.errors import UserError

TURNS = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"sentence": "good", "sentiment": "pos"}, "columns: {text: sentence, label: sentiment}"),
        ({"prompt": "q", "response": "a"}, "columns: {completion: response}"),
        ({"instruction": "q", "context": "c", "response": "a"}, "columns: {output: response}"),
        ({"Question": "q", "Best Answer": "a"}, "columns: {prompt: Question, completion: Best Answer}"),
        ({"question": "q", "response": "a"}, "columns: {answer: response}"),
        ({"id": 3, "body": "x"}, "columns: {text: body}"),
        ({"dialog": TURNS}, "columns: {messages: dialog}"),
        ({"tweet": "x", "Label": 3}, "columns: {text: tweet, label: Label}"),
        ({"good answer": "a", "bad answer": "b"}, ""),
        ({"better": "a", "worse": "b"}, ""),
        ({"input": "q", "response": "a", "label": False}, "columns: {prompt: input, completion: response}"),
        ({"x": 1.5}, ""),
        ({"x": ["a"]}, ""),
        ({}, ""),
    ],
)
def test_a_map_is_advised_by_what_the_columns_are_called(fields, advice):
    assert advise_columns(Row(fields, "f:1"), "auto") == advice


@given(st.dictionaries(st.text(min_size=1, max_size=12), st.text(max_size=8), min_size=1, max_size=4))
def test_whatever_is_advised_works(fields):
    """The fix of the error, applied to the rows, reads them."""
    row = Row(fields, "f:1")
    try:
        select_reader(row, "auto")
    except UserError as error:
        [problem] = error.problems
        if problem.fix.startswith("set data."):
            columns = yaml.safe_load(problem.fix.removeprefix("set data."))["columns"]
            [renamed] = rename([row], columns)
            name, _ = select_reader(renamed, "auto")
            assert to_examples([renamed], name)


@pytest.mark.parametrize(
    ("fields", "given", "advice"),
    [
        ({"q": "a", "response": "b"}, {"prompt": "q"}, {"prompt": "q", "completion": "response"}),
        ({"q": "a", "b": "c"}, {"question": "q", "x": "b"}, {"prompt": "q", "completion": "b"}),
        ({"t": "a", "response": "b"}, {"prompt": "say {{ t }}"}, {"prompt": "say {{ t }}", "completion": "response"}),
    ],
    ids=str,
)
def test_columns_that_are_given_are_kept_in_the_advice(fields, given, advice):
    row = Row(fields, "f:1")
    [renamed] = rename([row], given)
    with pytest.raises(UserError) as caught:
        select_reader(renamed, "auto", given)
    [problem] = caught.value.problems
    columns = yaml.safe_load(problem.fix.removeprefix("set data."))["columns"]
    assert columns == advice
    [again] = rename([row], columns)
    assert select_reader(again, "auto")[0] == "prompt-completion"
