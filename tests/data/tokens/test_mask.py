"""Masks are proven on decoded tokens: what is learnt, read back, is the answer and its end token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.data.chat.template import DEFAULT_TEMPLATE, ensure_chat_template, render, render_prompt
from peftkit.data.formats import Example
from peftkit.data.tokens.mask import IGNORE_INDEX, tokenize
from peftkit.errors import UserError
from tests.conftest import TINY_LLAMA

CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def learnt(tokenizer, example, mask="completion"):
    [row] = tokenize([render(example, tokenizer)], tokenizer, mask=mask)
    assert len(row.input_ids) == len(row.labels)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    return tokenizer.decode([token for token in row.labels if token != IGNORE_INDEX])


def chat(*turns):
    roles = ("user", "assistant")
    return Example("w", messages=tuple({"role": roles[i % 2], "content": t} for i, t in enumerate(turns)))


def test_chat_learns_each_answer_with_its_end_token(tokenizer):
    example = chat("What is 1+1?", "It is 2.", "And 2+2?", "It is 4.")
    assert learnt(tokenizer, example) == "It is 2.<|end|>It is 4.<|end|>"
    assert learnt(tokenizer, example, "assistant") == "It is 2.<|end|>It is 4.<|end|>"
    assert learnt(tokenizer, example, "last-turn") == "It is 4.<|end|>"
    assert learnt(tokenizer, example, "all") == render(example, tokenizer).text


def test_blanks_after_the_end_token_are_not_learnt(tokenizer):
    from copy import deepcopy

    chatml = deepcopy(tokenizer)
    chatml.chat_template = CHATML
    assert learnt(chatml, chat("hi", "hello\n", "more", "yes")) == "hello\n<|end|>yes<|end|>"


def test_prompt_turns_are_never_learnt_whoever_speaks(tokenizer):
    turns = [("user", "a"), ("assistant", "PROMPT"), ("user", "b"), ("assistant", "done")]
    example = Example("w", messages=tuple({"role": r, "content": c} for r, c in turns), num_given=3)
    assert learnt(tokenizer, example) == "done<|end|>"


def test_everything_learnt_has_one_end_token(tokenizer):
    from copy import deepcopy

    chatml = deepcopy(tokenizer)
    chatml.chat_template = CHATML
    assert learnt(chatml, chat("hi", "yo"), "all").count("<|end|>") == 2  # one for each turn


def test_prompt_completion_learns_the_completion_and_an_end_token(tokenizer):
    assert learnt(tokenizer, Example("w", prompt="def f(x):\n", completion="    return x")) == "    return x<|end|>"


def test_text_learns_everything(tokenizer):
    assert learnt(tokenizer, Example("w", completion="import os"), "all") == "import os<|end|>"


def test_base_without_template_gets_the_default_one(tokenizer):
    from copy import deepcopy

    bare = deepcopy(tokenizer)
    bare.chat_template = None
    assert ensure_chat_template(bare)
    assert bare.chat_template == DEFAULT_TEMPLATE
    assert not ensure_chat_template(bare)
    assert learnt(bare, chat("hi", "hello", "more", "yes")) == "hello<|end|>yes<|end|>"
    prompt, reference = render_prompt(chat("hi", "hello"), bare)
    assert (prompt, reference) == ("### User:\nhi\n\n### Assistant:\n", "hello")


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    from copy import deepcopy

    odd = deepcopy(tokenizer)
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        render(chat("a", "b", "c", "d"), odd)


def test_start_token_comes_once_where_the_tokenizer_wants_it(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    with_bos = deepcopy(tokenizer)
    with_bos.bos_token = "<|system|>"
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", bos)]
    )
    [row] = tokenize([render(chat("hi", "yes"), with_bos)], with_bos, mask="completion")
    assert row.input_ids.count(bos) == 1
    assert row.input_ids[0] == bos
    assert row.labels[0] == IGNORE_INDEX


words = st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(
    lambda t: t.strip() and "<|" not in t
)


@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3))
@settings(max_examples=60)
def test_any_chat_learns_exactly_its_answers(tokenizer, turns):
    example = chat(*(text for pair in turns for text in pair))
    assert learnt(tokenizer, example) == "".join(answer + "<|end|>" for _, answer in turns)


def test_turns_weigh_for_themselves_where_everything_is_learnt(tokenizer):
    turns = chat("one", "two", "three", "four").messages
    weighed = tuple({**m, "weight": w} if w is not None else m for m, w in zip(turns, (None, 0, None, 2), strict=True))
    [row] = tokenize([render(Example("w", messages=weighed), tokenizer)], tokenizer, mask="all")
    learnt_text = tokenizer.decode([token for token in row.labels if token != IGNORE_INDEX])
    assert "two" not in learnt_text and "one" in learnt_text and "four" in learnt_text
    assert {w for w, label in zip(row.weights, row.labels, strict=True) if label != IGNORE_INDEX} == {1.0, 2.0}
