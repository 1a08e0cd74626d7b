import pytest

from peftkit.data.formats import BadRow, Example, detect_format, select_reader
from peftkit.data.read import Row

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def one(fields, wanted="auto"):
    row = Row(fields, "data.jsonl:1")
    return select_reader(row, wanted)[1](row)


def refused(fields, wanted="auto"):
    with pytest.raises(BadRow) as caught:
        one(fields, wanted)
    return caught.value


def test_tool_calls_become_mappings_whoever_wrote_them():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "3", "tool_call_id": "c1"}, ANSWER]
    example = one({"messages": turns, "tools": '[{"type": "function", "function": {"name": "add"}}]'})
    assert example.messages[1]["tool_calls"][0]["function"] == {
        **{"name": "add", "arguments": {"a": 1}, "arguments_text": '{"a": 1}'}
    }
    assert example.messages[2] == {"role": "tool", "content": "3", "tool_call_id": "c1"}
    assert example.tools[0]["function"]["name"] == "add"
    shared = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "hello"},
    ]
    other = one({"conversations": shared, "system": "be brief"})
    assert [m["role"] for m in other.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert other.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_parts_of_text_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    assert one({"messages": [USER, {"role": "assistant", "content": parts}]}).messages[1] == ANSWER
    seen = [{"type": "image", "url": "x"}]
    assert "a turn with image" in refused({"messages": [{"role": "user", "content": seen}, ANSWER]}).got


def test_reasoning_and_weights_travel_with_their_turn():
    turn = {**ANSWER, "thinking": "hm", "weight": 0}
    example = one({"messages": [USER, turn], "weight": 0.5})
    assert example.messages[1] == {**ANSWER, "reasoning_content": "hm", "weight": 0.0}
    assert example.weight == 0.5
    assert "the weight -1" in refused({"prompt": "a", "completion": "b", "weight": -1}).got


def test_preferences_as_text_and_as_turns():
    example = one({"prompt": "hi", "chosen": "hello", "rejected": "go away"})
    assert (example.prompt, example.completion, example.rejected) == ("hi", "hello", "go away")
    turns = one({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]})
    assert turns.messages == (USER, ANSWER)
    assert turns.rejected[-1]["content"] == "no"
    apart = one({"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no"}]})
    assert apart.messages == (USER, ANSWER)


@pytest.mark.parametrize(
    ("fields", "check", "said"),
    [
        ({"messages": [ANSWER]}, "roles", "assistant turns alone"),
        ({"messages": [USER]}, "roles", "ends with user"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty-answers", "an empty answer"),
        ({"messages": [USER, "hello"]}, "missing-fields", "a turn that is str"),
        ({"messages": "[1"}, "missing-fields", "messages that is not JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "x"}]}, "missing-fields", "tool_calls that are str"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "missing-fields", "without a name"),
        ({"messages": [USER, ANSWER], "tools": "x"}, "missing-fields", "tools that is not JSON"),
        ({"chosen": "a", "rejected": None}, "missing-fields", "rejected is missing"),
    ],
)
def test_rows_that_do_not_fit_say_which_check_they_fail(fields, check, said):
    bad = refused(fields)
    assert (bad.check, said in bad.got) == (check, True), bad.got


def test_a_chat_in_a_table_is_json_text():
    row = Row({"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'}, "w")
    assert detect_format([row]) == "chat"
    assert one(row.fields).messages == (USER, ANSWER)


def test_an_example_comes_back_from_json_as_it_was():
    import json

    for example in (
        one({"messages": [USER, ANSWER], "weight": 2}),
        one({"prompt": "a", "chosen": "b", "rejected": "c"}),
        Example("w", words=("a", "b"), tags=("O", "B")),
        Example("w", prompt="a", label="1"),
    ):
        assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example


def test_a_call_of_sharegpt_keeps_its_weight():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "weight": 0}
    turns = [{"from": "human", "value": "hi"}, call, {"from": "observation", "value": "1"}]
    example = one({"conversations": [*turns, {"from": "gpt", "value": "done"}]})
    assert example.messages[1]["weight"] == 0.0


def test_structs_of_parquet_bring_no_arguments_that_nobody_wrote(tmp_path):
    import pyarrow
    import pyarrow.parquet

    from peftkit.data.read import read
    from peftkit.recipe.schema import Source

    def row(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "hi", "tool_calls": None}, answer]}

    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row({"x": 1}), row({"y": "s"})]), path)
    found = [one(row.fields) for row in read(Source(path=str(path)), where="")]
    calls = [example.messages[1]["tool_calls"][0]["function"]["arguments"] for example in found]
    assert calls == [{"x": 1}, {"y": "s"}]
