import json

import pytest

from peftkit.data.rows.ingest import ingest, refuse_unusable_rows
from peftkit.errors import UserError
from peftkit.recipe.schema import Data
from tests.conftest import chat, write_jsonl


def taken(where=".".join, seed=0, **data):
    return ingest(Data(**data), seed=seed, where=where)


def texts(examples):
    return [example.completion or example.answer for example in examples]


@pytest.fixture
def two(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(30)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(10)])
    return str(a), str(b)


def test_rows_of_a_mixture_are_counted_or_weighed_and_never_taken_twice(two):
    a, b = two
    counted = taken(train=[{"path": a, "rows": 5}, b], eval=None)
    assert [sum(t[0] == name for t in texts(counted.train)) for name in "ab"] == [5, 10]
    assert texts(counted.train) == texts(taken(train=[{"path": a, "rows": 5}, b], eval=None).train)
    other = taken(train=[{"path": a, "rows": 5}, b], eval=None, seed=1)
    assert texts(counted.train) != texts(other.train)
    weighed = taken(train=[{"path": a, "weight": 1}, {"path": b, "weight": 1}], eval=None)
    assert [sum(t[0] == name for t in texts(weighed.train)) for name in "ab"] == [10, 10]
    assert len(set(texts(weighed.train))) == 20


def test_mixtures_that_cannot_be_are_refused(two, tmp_path):
    a, b = two
    with pytest.raises(UserError, match="at most 10"):
        taken(train=[{"path": b, "rows": 11}], eval=None)
    with pytest.raises(UserError, match="weights for 1 of 2 sources"):
        taken(train=[{"path": a, "weight": 1}, b], eval=None)
    classes = str(write_jsonl(tmp_path / "c.jsonl", [{"text": "x", "label": "1"}]))
    with pytest.raises(UserError, match="formats text, classification"):
        taken(train=[a, classes], eval=None)


def test_sources_of_several_kinds_of_text_are_mixed(two, tmp_path):
    chats = str(write_jsonl(tmp_path / "c.jsonl", [chat("hi", "hello")]))
    found = taken(train=[two[1], chats], eval=None)
    assert (found.format, len(found.train)) == ("mixed", 11)


def test_columns_and_formats_may_differ_by_source(tmp_path):
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"q": "one", "a": "two"}])
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"question": "three", "answer": "four"}])
    sources = [{"path": str(odd), "columns": {"question": "q", "answer": "a"}}, str(plain)]
    assert texts(taken(train=sources, eval=None).train) == ["two", "four"]


def test_a_group_stays_on_one_side(tmp_path):
    rows = [{"text": f"row {i} " * 5, "book": i % 7} for i in range(70)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    found = taken(train=str(path), eval=0.3, group="book")

    def books(examples):
        return {int(example.completion.split()[1]) % 7 for example in examples}

    assert found.eval
    assert not books(found.train) & books(found.eval)
    with pytest.raises(UserError, match="no column shelf"):
        taken(train=str(path), eval=0.3, group="shelf")


def test_a_share_holds_out_nothing_that_a_row_of_the_rest_nearly_repeats(tmp_path):
    import random

    words = [
        "time",
        "year",
        "people",
        "way",
        "day",
        "man",
        "thing",
        "woman",
        "life",
        "child",
        "world",
        "school",
        "state",
        "family",
    ]
    chosen = random.Random(0)

    def question():
        return " ".join(chosen.choice(words) + str(chosen.randrange(99)) for _ in range(30))

    alone = [question() for _ in range(60)]
    twins = [text + suffix for text in (question() for _ in range(40)) for suffix in ("", " please")]
    path = write_jsonl(tmp_path / "d.jsonl", [chat(text, "yes") for text in [*alone, *twins]])
    found = taken(train=str(path), eval=0.2)
    learnt = {example.messages[0]["content"].removesuffix(" please") for example in found.train}
    held = {example.messages[0]["content"].removesuffix(" please") for example in found.eval}
    assert held
    assert not learnt & held
    assert found.num_near_duplicates > 0


def test_rows_that_cannot_be_used_are_counted_and_refused_unless_waived(tmp_path):
    path = tmp_path / "d.jsonl"
    good, bad = json.dumps(chat("hi", "hello")), json.dumps({"messages": []})
    path.write_text("\n".join([good, "{", bad, good.replace("hello", " ")]), encoding="utf-8")
    found = taken(train=str(path), eval=None)
    assert len(found.train) == 1
    assert found.tally.of("malformed-rows").rows[0][0] == f"{path}:2"
    with pytest.raises(UserError) as caught:
        refuse_unusable_rows(found, ())
    said = str(caught.value)
    assert f"{path}:3: got messages is empty" in said
    assert f"{path}:4: got an empty answer" in said
    assert "data.waive: [malformed-rows, missing-fields, empty-answers]" in said
    refuse_unusable_rows(found, ["malformed-rows", "missing-fields", "empty-answers"])


def test_a_source_without_one_usable_row_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": []}] * 30)
    with pytest.raises(UserError) as caught:
        taken(train=str(path), eval=None)
    assert "in 30 rows, such as" in str(caught.value)
    assert len(caught.value.problems) == 1, "one cause, one problem"


def test_the_system_prompt_and_reasoning_are_as_the_recipe_says(tmp_path):
    turn = {"role": "assistant", "content": "<think>hm</think>\nyes", "reasoning_content": "hm"}
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "hi"}, turn]}])
    found = taken(train=str(path), eval=None, chat={"system": "be brief", "thinking": "drop"})
    assert [m["content"] for m in found.train[0].messages] == ["be brief", "hi", "yes"]
    assert "reasoning_content" not in found.train[0].messages[2]


def test_the_same_content_is_read_once(two, monkeypatch):
    from peftkit.data.rows import ingest as module

    first = taken(train=two[0], eval=0.2)
    monkeypatch.setattr(module, "_read_sources", None)
    assert texts(taken(train=two[0], eval=0.2).train) == texts(first.train)


def test_a_group_that_is_most_of_the_data_is_left_to_be_learnt(tmp_path):
    rows = [{"text": f"row {i}", "g": "big" if i < 90 else f"g{i}"} for i in range(100)]
    path = str(write_jsonl(tmp_path / "d.jsonl", rows))
    for seed in range(8):
        found = taken(train=path, eval=0.05, group="g", seed=seed)
        assert 5 <= len(found.eval) <= 7


def test_a_first_row_that_does_not_fit_is_one_fault(tmp_path):
    rows = [{"prompt": "x"}, *({"prompt": f"q{i}", "completion": "a"} for i in range(5))]
    found = taken(train=str(write_jsonl(tmp_path / "d.jsonl", rows)), eval=None)
    assert (found.format, len(found.train), found.tally.of("missing-fields").count) == ("prompt-completion", 5, 1)
    with pytest.raises(UserError, match="the columns prompt"):
        taken(train=str(write_jsonl(tmp_path / "e.jsonl", rows[:1] * 3)), eval=None)


def test_a_file_renamed_to_another_kind_is_read_anew(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    path = write_jsonl(folder / "a.txt", [{"prompt": "q", "completion": "a"}])
    assert taken(train=f"{folder}/", eval=None).format == "text"
    path.rename(folder / "a.jsonl")
    assert taken(train=f"{folder}/", eval=None).format == "prompt-completion"


def test_held_out_rows_of_another_task_are_refused(two, tmp_path):
    classes = str(write_jsonl(tmp_path / "c.jsonl", [{"text": "x", "label": "1"}]))
    chats = str(write_jsonl(tmp_path / "m.jsonl", [chat("hi", "hello")]))
    with pytest.raises(UserError, match="formats chat, text, classification"):
        taken(train=[chats, two[0]], eval=classes)


def test_a_full_or_read_only_cache_is_told_or_passed_over(tmp_path, monkeypatch, two):
    import errno

    from peftkit.data.rows import ingest as module

    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))

    def full(*rest, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.JsonLinesWriter, "append", full)
    with pytest.raises(UserError, match="set PEFTKIT_CACHE"):
        taken(train=two[0], eval=None)
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda *rest: False)
    assert len(taken(train=two[0], eval=None, seed=5).train) == 30


def test_a_file_that_changes_while_it_is_read_is_told(two, monkeypatch):
    import os

    from peftkit.data.rows import ingest as module

    real = module._Ingestion._add_row

    def touching(self, row, convert):
        os.utime(two[1], (1, 1))
        real(self, row, convert)

    monkeypatch.setattr(module._Ingestion, "_add_row", touching)
    with pytest.raises(UserError, match="changed while they were read"):
        taken(train=two[1], eval=None, seed=9)
