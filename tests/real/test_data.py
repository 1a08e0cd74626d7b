"""Rows as other tools document them: learned as they are meant, or refused with the column by name."""

import csv
import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

import peftkit
from peftkit.data.formats import labels_of, to_examples
from peftkit.data.formats.unused import resembles
from peftkit.data.read import Row
from peftkit.data.read.sources import read_rows
from peftkit.data.read.texts import csv_delimiter
from peftkit.errors import UserError
from tests.conftest import TINY_LLAMA, write_jsonl

NUM = 60


def recipe_of(tmp_path, rows, **options):
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    train = {"max_steps": 2, "max_length": 128, "batch_size": 8, **options}
    return {"base": str(TINY_LLAMA), "method": "lora", "data": {"train": str(data), "eval": "20%"}, "train": train}


def check(tmp_path, row):
    """The report of the check on NUM rows that `row` makes of a number."""
    return peftkit.check_data(recipe_of(tmp_path, [row(i) for i in range(NUM)]))


def learned(report):
    """What the first sample has in the loss, as one text for each answer."""
    pieces = [(piece.text, piece.kind.startswith("learnt")) for piece in report.samples[0].pieces]
    joined = "".join(f"\0{text}" if is_in else "\1" for text, is_in in pieces)
    return [part.replace("\0", "") for part in joined.split("\1") if part]


def turns(*contents, **keys):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


UNPAIRED = {
    "TRL": lambda i: {"prompt": f"q{i}", "completion": f"a{i}", "label": i % 3 == 0},
    "TRL, turns": lambda i: {"prompt": turns(f"q{i}"), "completion": turns("", f"a{i}")[1:], "label": False},
    "ms-swift": lambda i: {"messages": turns(f"q{i}", f"a{i}"), "label": i % 2 == 0},
    "ShareGPT": lambda i: {"conversations": turns(f"q{i}", f"a{i}"), "label": True},
    "LLaMA-Factory, Alpaca": lambda i: {"instruction": f"q{i}", "input": "", "output": f"a{i}", "kto_tag": False},
    "LLaMA-Factory, ShareGPT": lambda i: {"messages": turns(f"q{i}", f"a{i}"), "kto_tag": True},
    "a table": lambda i: {"prompt": f"q{i}", "completion": f"a{i}", "label": "False"},
    "a table of numbers": lambda i: {"prompt": f"q{i}", "completion": f"a{i}", "label": str(i % 2)},
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_rated_answers_are_preferences_and_not_trained(name, tmp_path):
    assert check(tmp_path, UNPAIRED[name]).totals.format == "unpaired-preference"
    with pytest.raises(UserError, match="KTO"):
        peftkit.make_plan(recipe_of(tmp_path, [UNPAIRED[name](i) for i in range(NUM)]))


def test_a_label_that_rates_nothing_is_a_column_of_its_own(tmp_path):
    report = check(tmp_path, lambda i: {"prompt": f"q{i}", "completion": f"a{i}", "label": "maths"})
    assert report.totals.format == "prompt-completion"
    [finding] = [finding for finding in report.findings if finding.check == "unused-columns"]
    assert (finding.status, finding.rows) == ("warn", (("label", "looks like labels, in 60 rows"),))


def test_history_and_system_of_alpaca_rows_are_read(tmp_path):
    row = {"instruction": "q2", "input": "", "output": "a2", "history": [["q0", "a0"], ["q1", "a1"]], "system": "Brief"}
    report = check(tmp_path, lambda i: {**row, "output": f"a2 {i}"})
    first, second, third = learned(report)
    assert ("a0" in first, "a1" in second, "a2" in third) == (True, True, True)
    text = "".join(piece.text for piece in report.samples[0].pieces)
    assert text.index("Brief") < text.index("q0") < text.index("q1") < text.index("q2")
    bad = recipe_of(tmp_path, [{**row, "history": "q0"} for _ in range(NUM)])
    with pytest.raises(UserError, match="history"):
        peftkit.check_data(bad)


@pytest.mark.parametrize(
    "mask", [{"loss": False}, {"train": False}, {"training": False}, {"loss_mask": 0}, {"weight": 0}], ids=str
)
def test_a_masked_turn_is_context(mask, tmp_path):
    key, off = next(iter(mask.items()))

    def row(i):
        first, wrong, second, right = turns(f"q{i}", f"wrong {i}", "again", f"right {i}")
        on = True if off is False else 1
        return {"messages": [{**first, key: off}, {**wrong, key: off}, second, {**right, key: on}]}

    report = check(tmp_path, row)
    [answer] = learned(report)
    assert "right" in answer
    assert "wrong" in "".join(piece.text for piece in report.samples[0].pieces)
    assert not peftkit.make_plan(recipe_of(tmp_path, [row(i) for i in range(NUM)])).data.weighted, "a mask is no weight"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"supervise": False}, "supervise: False"),
        ({"in_loss": 0}, "in_loss: 0"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, "train_detail"),
    ],
)
def test_a_mask_that_nobody_knows_is_refused(keys, said, tmp_path):
    rows = [{"messages": [*turns(f"q{i}"), {"role": "assistant", "content": f"a{i}", **keys}]} for i in range(NUM)]
    with pytest.raises(UserError) as caught:
        peftkit.check_data(recipe_of(tmp_path, rows))
    [problem] = caught.value.problems
    assert said in problem.got
    assert f"in {NUM} rows" in problem.got


def test_a_turn_of_the_user_is_not_trained(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}", "train": True}, *turns("", "a")[1:]]} for i in range(NUM)
    ]
    with pytest.raises(UserError, match="assistant turns alone"):
        peftkit.check_data(recipe_of(tmp_path, rows))


@pytest.mark.parametrize("column", ["images", "image", "videos", "audios", "audio", "image_path", "audio_url"])
def test_media_are_refused_by_their_column(column, tmp_path):
    rows = [{"messages": turns(f"<image> what is {i}", "a cat"), column: ["a.png"]} for i in range(NUM)]
    with pytest.raises(UserError) as caught:
        peftkit.check_data(recipe_of(tmp_path, rows))
    [problem] = caught.value.problems
    assert f"media in {column}, in {NUM} rows" in problem.got
    empty = check(tmp_path, lambda i: {"messages": turns(f"q{i}", "a cat"), column: []})
    assert empty.totals.num_train == NUM - 12


def test_what_is_not_read_is_named_in_check_and_plan(tmp_path):
    def row(i):
        answer = {"role": "assistant", "content": f"a{i}", "model": "m"}
        return {"messages": [*turns(f"q{i}"), answer], "id": i, "source": "x", "rating": 4, "tags": []}

    report = check(tmp_path, row)
    [finding] = [finding for finding in report.findings if finding.check == "unused-columns"]
    assert finding.said == "columns that are not read: id, messages[].model, rating, source"
    assert finding.rows == (("rating", f"looks like labels, in {NUM} rows"),)
    plan = peftkit.make_plan(recipe_of(tmp_path, [row(i) for i in range(NUM)]))
    [unused] = [decision for decision in plan.decisions if decision.key == "data.unused"]
    assert unused.value == ["id", "messages[].model", "rating", "source"]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("history", [["a", "b"]], "turns"),
        ("log", [{"role": "user", "content": "x"}], "turns"),
        ("conversation", "x", "turns"),
        ("assistant_masks", [0, 1], "a mask"),
        ("m", [0, 0, 1], "a mask"),
        ("is_toxic", True, "labels"),
        ("flag", False, "labels"),
        ("score", 0.5, "labels"),
        ("rejected_response", "x", "labels"),
        ("messages[].thoughts", "x", "reasoning"),
        ("id", 7, ""),
        ("source", "web", ""),
    ],
)
def test_an_unused_column_is_told_by_what_it_looks_like(name, value, kind):
    assert resembles(name, value) == kind


def recipe_of_lengths(tmp_path, lengths, **train):
    """One row for each length, in words; nothing held out, checks of the amount waived."""
    rows = [{"prompt": f"say {n}", "completion": " word" * n} for n in lengths]
    recipe = recipe_of(tmp_path, rows, **train)
    recipe["train"].pop("max_steps")
    waived = ["duplicates", "near-duplicates", "enough-data", "near-leakage"]
    return {**recipe, "data": {**recipe["data"], "eval": None, "waive": waived}}


@pytest.mark.parametrize("packing", [False, True], ids=["by themselves", "packed"])
@pytest.mark.parametrize(("num_rows", "batch_size", "micro"), [(5, 6, 2), (3, 16, 4), (9, 4, 2)])
def test_epochs_are_passes(num_rows, batch_size, micro, packing, tmp_path):
    """All tokens are counted twice in two epochs: no row fills a batch up."""
    options = {"packing": True, "max_length": 32} if packing else {"micro_batch": micro}
    recipe = recipe_of_lengths(tmp_path, range(1, num_rows + 1), batch_size=batch_size, epochs=2, **options)
    tokens = []

    def count(event):
        if event["event"] == "step":
            tokens.append(event["tokens_per_second"] * event["step_seconds"])

    peftkit.finetune(recipe, out=tmp_path / "run", observer=count)
    num_tokens = peftkit.check_data(recipe).totals.num_tokens
    assert sum(tokens) == pytest.approx(2 * num_tokens, rel=0.02)


def weights_after(recipe, out):
    return load_file(peftkit.finetune(recipe, out=out).result / "adapter_model.safetensors")


@pytest.mark.parametrize(("num_rows", "batch_size", "micro"), [(5, 6, 2), (3, 16, 4)])
def test_a_smaller_last_batch_is_weighed_by_its_own_tokens(num_rows, batch_size, micro, tmp_path):
    """A step of five rows in a batch of six is the step of a batch of five: the same weights come of it."""
    partial = recipe_of_lengths(tmp_path, range(1, num_rows + 1), batch_size=batch_size, micro_batch=micro, epochs=1)
    partial["train"]["learning_rate"] = 5e-4
    whole = {**partial, "train": {**partial["train"], "batch_size": num_rows, "micro_batch": 1}}
    one, other = weights_after(partial, tmp_path / "partial"), weights_after(whole, tmp_path / "whole")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one), "steps are 5e-4"
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name), "something was learned"


@pytest.mark.parametrize(
    ("value", "text"), [(4, "4"), (2.5, "2.5"), (True, "true"), (False, "false"), ("4", "4")], ids=str
)
def test_numbers_and_truth_values_are_answers(value, text, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": value if i % 2 else f"a{i}"} for i in range(NUM)]
    report = peftkit.check_data(recipe_of(tmp_path, rows))
    assert report.totals.num_train + report.totals.num_eval == NUM
    [example] = to_examples([Row({"prompt": "q", "completion": value}, "f:1")], "prompt-completion")
    assert example.completion == text


@pytest.mark.parametrize(
    ("values", "classes"),
    [([1.0, 0.0], ("0", "1")), ([True, False], ("false", "true")), ([1, 2], ("1", "2")), (["b", "a"], ("a", "b"))],
    ids=str,
)
def test_classes_as_pandas_and_json_write_them(values, classes):
    rows = [Row({"text": f"t{i}", "label": values[i % 2]}, f"f:{i}") for i in range(4)]
    assert labels_of(to_examples(rows, "classification")) == classes


def test_a_half_is_no_class():
    with pytest.raises(UserError, match="a class in label"):
        to_examples([Row({"text": "t", "label": 0.5}, "f:1")], "classification")


def test_class_names_of_datasets_are_read_from_parquet(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "PER"])),
        }
    )
    table = {"text": ["a", "b", "c"], "label": [1, 0, -1], "tags": [[0, 1], [1], []]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "rows.parquet")
    rows = read_rows([str(tmp_path / "rows.parquet")], where="data.train")
    assert [row.fields["label"] for row in rows] == ["pos", "neg", None]
    assert [row.fields["tags"] for row in rows] == [["O", "PER"], ["PER"], []]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_tables_of_any_delimiter_are_read(delimiter, tmp_path):
    lines = [["text", "label"], ["a, b", "x"], ['say "hi"; now', "y"]]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    rows = read_rows([str(tmp_path / "rows.csv")], where="data.train")
    assert [list(row.fields.values()) for row in rows] == lines[1:]
    assert list(rows[0].fields) == ["text", "label"]


def test_an_adapter_as_base_is_named(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    recipe = recipe_of(tmp_path, [{"text": "x"}])
    with pytest.raises(UserError, match=r"which is an adapter.*peftkit merge"):
        peftkit.make_plan({**recipe, "base": str(folder)})


REPAIRED = {
    "two user turns": (
        [("user", "a"), ("user", "b"), ("assistant", "c")],
        ["neighbouring user turns were joined"],
        ["user", "assistant"],
    ),
    "two answers": (
        [("user", "a"), ("assistant", "b"), ("assistant", "c")],
        ["neighbouring assistant turns were joined"],
        ["user", "assistant"],
    ),
    "a greeting first": (
        [("assistant", "hello"), ("user", "a"), ("assistant", "c")],
        ["the assistant turn at the start is context"],
        ["assistant", "user", "assistant"],
    ),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_chats_as_they_come_are_put_in_order_and_it_is_told(name, tmp_path):
    turns_given, repairs, roles = REPAIRED[name]
    rows = [{"messages": [{"role": role, "content": f"{text} {i}"} for role, text in turns_given]} for i in range(NUM)]
    [example] = to_examples([Row(rows[0], "f:1")], "chat")
    assert list(example.repairs) == repairs
    assert [turn["role"] for turn in example.messages] == roles
    report = peftkit.check_data(recipe_of(tmp_path, rows))
    [finding] = [finding for finding in report.findings if finding.check == "repairs"]
    assert (finding.status, finding.num_rows) == ("warn", NUM)
    assert "hello" not in "".join(learned(report)), "context is not trained"
    refused = recipe_of(tmp_path, rows)
    refused["data"]["chat"] = {"repair": "off"}
    with pytest.raises(UserError, match="turns out of order"):
        peftkit.check_data(refused)


@pytest.mark.parametrize(
    "turn_keys", [("role", "content"), ("from", "value"), ("speaker", "text"), ("author", "message")], ids=str
)
@pytest.mark.parametrize("roles", [("user", "assistant"), ("human", "gpt"), ("Human", "AI"), ("USER", "ASSISTANT")])
def test_turns_by_other_names_are_the_same_turns(turn_keys, roles):
    said = zip(roles, ("q", "a"), strict=True)
    turns_given = [dict(zip(turn_keys, pair, strict=True)) for pair in said]
    [example] = to_examples([Row({"messages": turns_given}, "f:1")], "chat")
    assert example.messages == ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


def test_a_tool_s_response_and_a_call_without_arguments_are_read():
    call = {"type": "function", "function": {"name": "now", "arguments": None}}
    turns_given = [
        *turns("What time is it?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"from": "function_response", "value": "noon"},
        {"role": "assistant", "content": "It is noon."},
    ]
    [example] = to_examples([Row({"messages": turns_given}, "f:1")], "chat")
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {}
    assert example.messages[2]["role"] == "tool"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "label": False},
        {"question": "q", "answer": "a", "label": False},
        {"instruction": "q", "output": "a", "label": 0},
        {"messages": turns("q", "a"), "kto_tag": "false"},
    ],
    ids=lambda row: next(iter(row)),
)
def test_a_rating_in_a_later_row_is_no_answer_to_learn(row, tmp_path):
    first = {key: value for key, value in row.items() if key not in {"label", "kto_tag"}}
    rows = [first, *([row] * NUM)]
    report = peftkit.check_data(recipe_of(tmp_path, rows))
    [finding] = [finding for finding in report.findings if finding.check == "rated-answers"]
    assert (finding.status, finding.num_rows) == ("fail", NUM)
    with pytest.raises(UserError, match="which rates the answer"):
        peftkit.finetune(recipe_of(tmp_path, rows))
    kinds = {"prompt": "prompt-completion", "question": "question-answer", "instruction": "instruction"}
    named = recipe_of(tmp_path, rows)
    named["data"] |= {"format": kinds.get(next(iter(row)), "chat")}
    assert peftkit.check_data(named).totals.num_train > 0, "who names the format says that it rates nothing"


def test_media_in_a_turn_and_behind_a_template_are_refused(tmp_path):
    in_turn = [{"messages": [{**turns("<image>?")[0], "images": ["a.png"]}, *turns("", "cat")[1:]]}] * NUM
    with pytest.raises(UserError, match=r"media in messages\[\].images"):
        peftkit.check_data(recipe_of(tmp_path, in_turn))
    recipe = recipe_of(tmp_path, [{"q": f"<image>? {i}", "a": "cat", "images": ["a.png"], "id": i} for i in range(NUM)])
    recipe["data"]["columns"] = {"prompt": "{{ q }}", "completion": "{{ a }}"}
    with pytest.raises(UserError, match="media in images"):
        peftkit.check_data(recipe)


def test_media_in_turns_that_a_table_holds_as_text_are_refused(tmp_path):
    media = [{**turns("<image>?")[0], "images": ["a.png"]}, *turns("", "cat")[1:]]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([[json.dumps(media)]] * NUM)])
    recipe = recipe_of(tmp_path, [])
    recipe["data"]["train"] = str(path)
    with pytest.raises(UserError, match=r"media in messages\[\].images"):
        peftkit.check_data(recipe)


def test_rated_rows_that_are_held_out_are_refused_too(tmp_path):
    recipe = recipe_of(tmp_path, [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(NUM)])
    rated = [{"prompt": f"p{i}", "completion": f"b{i}", "label": False} for i in range(NUM)]
    recipe["data"]["eval"] = str(write_jsonl(tmp_path / "eval.jsonl", rated))
    with pytest.raises(UserError, match="which rates the answer"):
        peftkit.check_data(recipe)


CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("turn", "key", "value"),
    [
        ({"role": "assistant", "tool_calls": [CALL]}, "content", ""),
        ({"role": "assistant", "content": "", "text": "yes"}, "content", "yes"),
        ({"role": "assistant", "content": "yes", "reasoning": "", "thinking": "hm"}, "reasoning_content", "hm"),
    ],
    ids=["a call without content", "text beside empty content", "thinking beside empty reasoning"],
)
def test_a_turn_says_what_any_of_its_keys_says(turn, key, value):
    [example] = to_examples([Row({"messages": [*turns("q"), turn]}, "f:1")], "chat")
    assert example.messages[1][key] == value
    assert bool(example.messages[1].get("tool_calls")) == ("tool_calls" in turn)


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"content": "a", "text": "b"}, "content and text, which differ"),
        ({"content": "a", "reasoning": "b", "thinking": "c"}, "reasoning and thinking, which differ"),
        ({"content": "a", "reasoning": ["b"]}, "reasoning that is list"),
        ({"content": "a", "weight": 10**400}, "the weight"),
        ({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}, "not JSON"),
    ],
    ids=["texts", "reasonings", "a list", "a huge weight", "deep arguments"],
)
def test_a_turn_that_says_two_things_or_none_that_can_be_read_is_a_bad_row(turn, said):
    with pytest.raises(UserError, match=said):
        to_examples([Row({"messages": [*turns("q"), {"role": "assistant", **turn}]}, "f:1")], "chat")


def test_masks_that_disagree_mask():
    answer = {"role": "assistant", "content": "a", "loss": False, "weight": 1}
    [example] = to_examples([Row({"messages": [*turns("q"), answer]}, "f:1")], "chat")
    assert example.messages[1]["weight"] == 0.0


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "assistant", "content": "a"}] * 2, "assistant turns alone"),
        ([{"role": "system", "content": "be brief"}, *turns("q", "a")], "a system column beside a system turn"),
    ],
    ids=str,
)
def test_chats_that_no_repair_makes_right_are_refused(messages, said):
    row = Row({"messages": messages, "system": "another"}, "f:1")
    with pytest.raises(UserError, match=said):
        to_examples([row], "chat")


def test_a_greeting_after_the_system_turn_is_context_and_an_own_mask_is_kept():
    greeting = {"role": "assistant", "content": "hello"}
    with_system = [{"role": "system", "content": "s"}, greeting, *turns("q", "a")]
    [example] = to_examples([Row({"messages": with_system}, "f:1")], "chat")
    assert example.messages[1]["weight"] == 0.0
    masked = {"role": "assistant", "content": "hello", "train": False}
    [example] = to_examples([Row({"messages": [masked, *turns("q", "a")]}, "f:1")], "chat")
    assert (example.messages[0]["weight"], example.repairs) == (0.0, ())
    empty = [*turns("q"), {"role": "assistant", "content": ""}, {"role": "assistant", "content": "b"}]
    [example] = to_examples([Row({"messages": empty}, "f:1")], "chat")
    assert example.messages[1]["content"] == "b"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_table_lacks_is_no_answer(value):
    with pytest.raises(UserError, match="completion is"):
        to_examples([Row({"prompt": "q", "completion": value}, "f:1")], "prompt-completion")


@pytest.mark.parametrize(
    ("lines", "delimiter"),
    [("text;label, coarse\nhi;x\n", ";"), ("a,b;c\n1,2\n", ","), ("a;b\n1;2\n", ";"), ("a\n1\n", ",")],
)
def test_a_header_with_another_s_sign_is_read_by_its_rows(lines, delimiter):
    assert csv_delimiter(*lines.splitlines()) == delimiter


@pytest.mark.parametrize("name", ["label", "labels"])
def test_one_class_in_a_list_is_a_class_and_several_are_told_apart_or_named(name, tmp_path):
    def recipe_with(values, **data):
        rows = [{"text": f"words of row {n}", name: values[n % 2]} for n in range(12)]
        source = {"train": str(write_jsonl(tmp_path / "r.jsonl", rows)), **data}
        return {"base": str(TINY_LLAMA), "method": "lora", "data": source}

    one = peftkit.make_plan(recipe_with([["a"], "b"]))
    assert (one.base.task, one.base.labels) == ("classification", ("a", "b"))
    several = peftkit.make_plan(recipe_with([["a", "b"], ["c"]]))
    assert (several.base.task, several.base.labels) == ("multi-label", ("a", "b", "c"))
    with pytest.raises(UserError) as caught:
        peftkit.make_plan(recipe_with([["c"], ["a", "b"]]))
    assert "data.format: multi-label" in caught.value.problems[0].expected
    assert peftkit.make_plan(recipe_with([["c"], ["a", "b"]], format="multi-label")).base.labels == ("a", "b", "c")


def test_the_error_about_a_byte_names_the_encoding_and_that_works(tmp_path):
    (tmp_path / "rows.csv").write_bytes("text;label\ncafé one;a\nthé two;b\n".encode("windows-1252"))
    recipe = {"base": str(TINY_LLAMA), "method": "lora", "data": {"train": str(tmp_path / "rows.csv")}}
    with pytest.raises(UserError) as caught:
        peftkit.make_plan(recipe)
    said = re.search(r"\{path: FILE, [^}]*\}", caught.value.problems[0].fix).group()
    source = yaml.safe_load(said.replace("FILE", str(tmp_path / "rows.csv")))
    assert peftkit.make_plan({**recipe, "data": {"train": source}}).base.labels == ("a", "b")
