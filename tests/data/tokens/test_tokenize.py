"""Tokenizing goes on where it was interrupted, with the same result."""

import pytest
from transformers import AutoTokenizer

from peftkit import interrupt
from peftkit.data.rows import cache
from peftkit.data.rows.ingest import ingest
from peftkit.data.tokens import tokenize as tokenizing
from peftkit.data.tokens.prepare import tokenize_examples
from peftkit.errors import Interrupted
from peftkit.plan.plan import DataPlan
from peftkit.recipe.schema import Data
from tests.conftest import TINY_LLAMA, chat, write_jsonl

PLAN = DataPlan((), None, "chat", {}, "completion", "drop", 24)


@pytest.fixture
def examples(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizing, "FILE_EXAMPLES", 10)
    monkeypatch.setattr(tokenizing, "_CHUNK_EXAMPLES", 4)
    rows = [chat(f"say {'long ' * (i % 5 == 3) * 30}{i}", f"answer {i}") for i in range(60)]
    data = Data(train=str(write_jsonl(tmp_path / "d.jsonl", rows)), eval=0.2)
    return ingest(data, seed=0, where=".".join)


def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def whole(prepared):
    return (list(prepared.train), list(prepared.eval), prepared.fingerprint, prepared.truncation, prepared.seen.ends)


def test_an_interrupted_tokenization_goes_on_with_the_same_result(examples, tmp_path, monkeypatch):
    import shutil

    uninterrupted = whole(tokenize_examples(examples, tokenizer(), PLAN))
    shutil.rmtree(tmp_path / "cache" / "tokens")
    rendered = []
    real = tokenizing.render

    def counting(example, *rest, **named):
        rendered.append(example.where)
        return real(example, *rest, **named)

    def stop_after(num):
        def stop(message=""):
            if len(rendered) >= num:
                raise Interrupted(message, exit_code=130)

        return stop

    monkeypatch.setattr(tokenizing, "render", counting)
    monkeypatch.setattr(interrupt, "stop_if_requested", stop_after(33))
    with pytest.raises(Interrupted):
        tokenize_examples(examples, tokenizer(), PLAN)
    first = set(rendered)
    rendered.clear()
    monkeypatch.setattr(interrupt, "stop_if_requested", stop_after(1000))
    resumed = tokenize_examples(examples, tokenizer(), PLAN)
    assert whole(resumed) == uninterrupted
    assert len(first - set(rendered)) == 30  # three whole parts were not done again
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.name.startswith(".")]


def test_the_second_time_nothing_is_done_again(examples, monkeypatch):
    once = whole(tokenize_examples(examples, tokenizer(), PLAN))
    monkeypatch.setattr(tokenizing, "render", None)
    assert whole(tokenize_examples(examples, tokenizer(), PLAN)) == once


def test_what_is_done_follows_from_plan_and_tokenizer(examples):
    first = tokenize_examples(examples, tokenizer(), PLAN)
    from dataclasses import replace

    longer = tokenize_examples(examples, tokenizer(), replace(PLAN, max_length=256))
    assert len(longer.train) > len(first.train)
    other = tokenizer()
    other.chat_template = "{{ 'x' }}" + other.chat_template
    assert tokenize_examples(examples, other, PLAN).train[0].input_ids != first.train[0].input_ids


def test_examples_made_by_hand_are_not_mistaken_for_those_on_disk(examples):
    from dataclasses import replace

    tokenize_examples(examples, tokenizer(), PLAN)
    some = replace(examples, train=examples.train[:3], eval=())
    assert some.key == ""
    assert len(tokenize_examples(some, tokenizer(), PLAN).train) <= 3


def test_another_process_that_fills_the_same_folder_is_left_alone(examples, tmp_path):
    with cache.resumable_entry("tokens", "k") as one, cache.resumable_entry("tokens", "k") as other:
        assert one != other
