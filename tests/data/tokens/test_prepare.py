import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.rows.ingest import ingest
from peftkit.data.rows.split import hold_out_share
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.data.tokens.prepare import tokenize_examples
from peftkit.data.tokens.scan_tokens import TokenScanner
from peftkit.errors import UserError
from peftkit.plan.plan import DataPlan
from peftkit.recipe.schema import Data
from tests.conftest import TINY_LLAMA, chat, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def examples(tmp_path, rows, share=0.0):
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    return ingest(Data(train=str(path), eval=share), seed=0, where=".".join)


def plan(**changes):
    values = {
        "train": (),
        "eval": None,
        "format": "chat",
        "columns": {},
        "mask": "completion",
        "truncation": "drop",
        "max_length": 32,
    }
    return DataPlan(**{**values, **changes})


CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


ROWS = [chat("short", "yes"), chat("long " * 50, "no"), chat("again", "fine")]


def test_long_rows_are_dropped_and_counted(tmp_path, tokenizer):
    prepared = tokenize_examples(examples(tmp_path, ROWS), tokenizer, plan())
    assert (len(prepared.train), prepared.truncation.num_dropped, prepared.truncation.num_cut) == (2, 1, 0)


def test_long_rows_are_cut_at_the_front_and_counted(tmp_path, tokenizer):
    prepared = tokenize_examples(examples(tmp_path, ROWS), tokenizer, plan(truncation="keep_end"))
    assert (len(prepared.train), prepared.truncation.num_dropped, prepared.truncation.num_cut) == (3, 0, 1)
    assert len(prepared.train[1].input_ids) == 32
    assert tokenizer.decode(prepared.train[1].input_ids).endswith("<|assistant|>no<|end|>")


def test_held_out_rows_that_are_dropped_are_counted_and_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "held.jsonl", [chat("long " * 50, "no"), chat("fits", "yes")])
    fitted = tokenize_examples(examples(tmp_path, ROWS, str(path)), tokenizer, plan()).truncation
    assert (fitted.num_rows, fitted.num_dropped, fitted.shortest < 32 < fitted.longest) == (5, 2, True)
    assert [where for where, _ in fitted.too_long] == [f"{tmp_path / 'd.jsonl'}:2", f"{path}:1"]


def test_long_rows_are_errors_on_request(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"d\.jsonl:2: got \d+ tokens, expected at most 32"):
        tokenize_examples(examples(tmp_path, ROWS), tokenizer, plan(truncation="error"))


def test_all_rows_too_long(tmp_path, tokenizer):
    with pytest.raises(UserError, match="all 3 rows are longer"):
        tokenize_examples(examples(tmp_path, ROWS), tokenizer, plan(max_length=4))


def test_held_out_rows_follow_the_same_rule(tmp_path, tokenizer):
    from dataclasses import replace

    rows = examples(tmp_path, ROWS)
    split = replace(rows, train=rows.train[:1], eval=rows.train[1:])
    prepared = tokenize_examples(split, tokenizer, plan(truncation="keep_end"))
    assert [len(prepared.eval), len(prepared.eval_examples), prepared.truncation.num_cut] == [2, 2, 1]
    dropped = tokenize_examples(split, tokenizer, plan())
    assert [len(dropped.eval), len(dropped.eval_examples), dropped.truncation.num_dropped] == [1, 1, 1]
    with pytest.raises(UserError, match="held-out rows that are all longer"):
        tokenize_examples(replace(rows, train=rows.train[:1], eval=rows.train[1:2]), tokenizer, plan())


def test_rows_that_learn_nothing_are_errors(tmp_path, tokenizer):
    from copy import deepcopy

    deaf = deepcopy(tokenizer)
    deaf.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match=r"d\.jsonl:1: got a row without a token in the loss"):
        tokenize_examples(examples(tmp_path, ROWS[:1]), deaf, plan())


def test_an_answer_longer_than_the_limit_keeps_its_end(tmp_path, tokenizer):
    rows = [chat("hi", "long answer " * 30)]
    prepared = tokenize_examples(examples(tmp_path, rows), tokenizer, plan(truncation="keep_end"))
    assert (prepared.num_learnt, prepared.num_tokens, prepared.truncation.num_cut) == (32, 32, 1)
    assert prepared.train[0].input_ids[-1] == tokenizer.eos_token_id


@given(
    inputs=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_splits_never_share_an_input_and_lose_no_row(inputs, share, seed):
    held = hold_out_share(inputs, share, seed)
    train = set(range(len(inputs))) - held
    assert not {inputs[i] for i in train} & {inputs[i] for i in held}
    assert train
    if len(set(inputs)) > 1:
        assert held
    assert hold_out_share(inputs, share, seed) == held


@pytest.mark.parametrize("mask", ["all", "completion"])
def test_a_turn_that_is_not_learnt_between_others_ends_nothing(mask, tmp_path, tokenizer):
    """Under ChatML a line break follows the end token: it is learnt with the question before such a turn."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    row["messages"][1]["weight"] = 0
    prepared = tokenize_examples(examples(tmp_path, [row]), tokenizer, plan(mask=mask, max_length=128))
    [learnt] = prepared.train
    assert "two" not in tokenizer.decode([token for token in learnt.labels if token != IGNORE_INDEX])
    assert prepared.seen.tally.of("end-token").count == 0
    assert [tokenizer.decode(token) for token, _ in prepared.seen.ends] == ["<|end|>"]


def test_an_end_that_is_not_there_is_noticed_where_all_is_learnt(tokenizer):
    watch = TokenScanner(tokenizer, "causal-lm")
    ids = tokenizer("fine\n", add_special_tokens=False).input_ids
    watch.row(Tokenized(ids, ids, "d.jsonl:1"), all_trained=True)
    assert watch.tally.of("end-token").count == 1


def test_a_tokenizer_written_in_python(tmp_path):
    """Pairs of an encoder and a decoder need no characters of tokens; everything else does."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    pairs = examples(tmp_path, [{"source": "hello", "target": "hallo"}, {"source": "bye", "target": "ade"}])
    prepared = tokenize_examples(pairs, tokenizer, plan(format="seq2seq"), task="seq2seq")
    assert [tokenizer.decode(row.labels) for row in prepared.train] == ["hallo</s>", "ade</s>"]
    with pytest.raises(UserError, match=r"base: got ByT5Tokenizer, a slow tokenizer \(written in Python\)"):
        tokenize_examples(pairs, tokenizer, plan(format="seq2seq"))
