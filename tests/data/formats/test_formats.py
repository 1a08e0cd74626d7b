import pytest

from peftkit.data.formats import detect_format, rename, to_examples
from peftkit.data.read import Row
from peftkit.errors import UserError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def one(fields):
    rows = [Row(fields, "data.jsonl:1")]
    return to_examples(rows, detect_format(rows))[0]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": [USER, ANSWER]}, "chat"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "chat"),
        ({"prompt": "hi", "completion": "hello"}, "prompt-completion"),
        ({"instruction": "hi", "input": "", "output": "hello"}, "instruction"),
        ({"text": "hi hello"}, "text"),
    ],
)
def test_formats_are_detected_by_their_columns(fields, name):
    assert detect_format([Row(fields, "w")]) == name


def test_every_way_of_writing_a_chat_is_the_same_chat():
    expected = (USER, ANSWER)
    assert one({"messages": [USER, ANSWER]}).messages == expected
    assert (
        one({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}).messages
        == expected
    )
    assert one({"instruction": "hi", "output": "hello"}).messages == expected
    assert one({"prompt": [USER], "completion": [ANSWER]}).messages == expected


def test_turns_of_the_prompt_are_counted():
    assert one({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}).num_given == 3


def test_instruction_with_input_and_system():
    example = one({"instruction": "add", "input": "1 2", "output": "3", "system": "be brief"})
    assert [m["content"] for m in example.messages] == ["be brief", "add\n\n1 2", "3"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages is str"),
        ({"messages": [USER]}, "ends with user"),
        ({"messages": [ANSWER]}, "assistant turns alone"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty answer"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "the role 'boss'"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "content is NoneType"),
        ({"prompt": "x", "completion": ""}, "an empty completion"),
        ({"prompt": "x", "completion": None}, "completion is missing"),
        ({"prompt": 3, "completion": "y"}, "prompt is int"),
        ({"text": "  "}, "an empty text"),
    ],
)
def test_rows_that_do_not_fit_are_named_with_file_and_line(fields, said):
    with pytest.raises(UserError) as caught:
        one(fields)
    assert "data.jsonl:1" in str(caught.value)
    assert said in str(caught.value)


def test_wrong_columns_list_what_was_found_and_what_is_wanted():
    with pytest.raises(UserError) as caught:
        detect_format([Row({"promt": "x", "answer": "y"}, "d.jsonl:1")])
    said = str(caught.value)
    assert "the columns promt, answer" in said
    assert "prompt-completion: prompt + completion" in said
    assert "set data.columns: {prompt: promt, completion: answer}" in said
    with pytest.raises(UserError, match=r"the columns of chat: messages or conversations"):
        to_examples([Row({"text": "x"}, "w")], "chat")


def test_columns_are_mapped():
    rows = rename([Row({"question": "q", "answer": "a", "id": 1}, "w")], {"prompt": "question", "completion": "answer"})
    assert rows[0].fields == {"id": 1, "prompt": "q", "completion": "a"}
    with pytest.raises(UserError, match="'quest', which w lacks"):
        rename([Row({"question": "q"}, "w")], {"prompt": "quest"})
