"""Masks on templates that real models have and no package carries, and on tokenizers of all manners."""

import json
from copy import deepcopy

import pytest
from hypothesis import given, settings

from peftkit.data.chat.spans import choose_style
from peftkit.data.chat.template import DEFAULT_TEMPLATE, apply_template, render, render_prompt
from peftkit.data.formats import Example
from peftkit.data.tokens.mask import IGNORE_INDEX, encode, tokenize
from peftkit.errors import UserError
from tests.data.chat.test_chat_templates import (
    CHATS,
    FAMILIES,
    TOOLS,
    Family,
    before_last,
    by_name,
    example,
    learnt,
    said,
    tiny,
    tokenizer_of,
    trained,
    way_of,
    with_tokens,
    words,
)

ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for m in turns %}" + ALTERNATE + ""
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL1 = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# the system text goes into the last user turn, so that earlier turns change as later ones come
MISTRAL3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if m['role'] == 'user' %}"
    "{% if system is defined and m == (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{ '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% endif %}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{{ messages[0]['content'] }}"
    "{% else %}{% set turns = messages %}{{ 'A chat.' }}{% endif %}{% for m in turns %}"
    "{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}"
    "{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
FALCON = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{% if m['role'] == 'system' %}{{ 'System: ' }}{% elif m['role'] == 'user' %}{{ 'User: ' }}"
    "{% else %}{{ 'Falcon: ' }}{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' + 'Falcon:' }}{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] }}"
    "{% if not loop.last %}{{ eos_token + '\n' }}{% else %}{{ eos_token }}{% endif %}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# the whole chat ends in an end token that no turn but the last has
ONCE = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# the markers leave the end token outside
OUTSIDE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the markers hold the header that the prompt gives
HEADER = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM = ("<|im_end|>", "<|im_start|>")  # end and start
BY_HAND = [
    Family("llama-2", "prefixes", " {} </s>", "</s>", "<s>", trims=str.strip, template=LLAMA2),
    Family("mistral-1", "prefixes", "{}</s>", "</s>", "<s>", template=MISTRAL1),
    Family("zephyr", "prefixes", "{}</s>", "</s>", "<s>", template=ZEPHYR),
    Family("chatml", "prefixes", "{}<|im_end|>", "<|im_end|>", template=CHATML),
    # a base's end token is another; <|im_end|> closes turns all the same
    Family("chatml-base", "prefixes", "{}<|im_end|>", "<|endoftext|>", template=CHATML),
    Family("chatml-stops", "prefixes", "{}<|im_end|>", "<|endoftext|>", stops=IM[:1], template=CHATML_SYSTEM),
    Family("chatml-once", "prefixes", "{}<|im_end|>", "<|endoftext|>", stops=IM[:1], template=ONCE),
    Family("vicuna", "prefixes", " {}</s>", "</s>", "<s>", template=VICUNA),
    Family("alpaca", "prefixes", "{}</s>", "</s>", "<s>", template=ALPACA),
    Family("falcon", "prefixes", " {}", "<|endoftext|>", last=" {}<|endoftext|>", template=FALCON),
    Family("olmo", "prefixes", "{}<|endoftext|>", "<|endoftext|>", "<|endoftext|>", template=OLMO),
    Family("default", "prefixes", "{}<|endoftext|>", "<|endoftext|>", template=DEFAULT_TEMPLATE),
    Family("outside", "markers", "{}<|im_end|>", "<|endoftext|>", template=OUTSIDE),
    Family("header", "markers", "{}<|im_end|>", "<|im_end|>", template=HEADER),
]


@by_name(BY_HAND)
def test_learnt_are_the_answers_with_their_end_tokens(family):
    tokenizer = tokenizer_of(family)
    examples = [example(chat) for chat in CHATS.values()]
    for mask in ("completion", "assistant", "last-turn"):
        style, rendered, rows = trained(tokenizer, examples, mask, family.stops)
        assert way_of(style) == family.way
        for one, made, row in zip(examples, rendered, rows, strict=True):
            assert learnt(tokenizer, row) == family.learnt(one.messages, mask)
            assert made.text == apply_template(tokenizer, one.messages, (), add_generation_prompt=False, where="")
            assert not made.missing
            if family.bos:
                assert row.input_ids[0] == tokenizer.bos_token_id != row.input_ids[1]


@by_name(BY_HAND)
def test_what_stands_before_an_answer_is_the_prompt_for_it(family):
    tokenizer = tokenizer_of(family)
    examples = [example(chat) for chat in CHATS.values()]
    _, _, rows = trained(tokenizer, examples, "last-turn", family.stops)
    bos = tokenizer("")["input_ids"]
    for one, row in zip(examples, rows, strict=True):
        ids = tokenizer(render_prompt(one, tokenizer)[0], add_special_tokens=False)["input_ids"]
        assert before_last(row) == (ids if ids[: len(bos)] == bos else bos + ids)


@given(chat=words.flatmap(lambda a: words.map(lambda b: (said("user", a), said("assistant", b)))))
@settings(max_examples=25)
@pytest.mark.parametrize("name", ["llama-2", "falcon", "outside", "zephyr"])
def test_any_chat_learns_exactly_its_answer(name, chat):
    family = next(family for family in BY_HAND if family.name == name)
    tokenizer = tokenizer_of(family)
    _, _, [row] = trained(tokenizer, [example(chat)], "completion", family.stops)
    assert learnt(tokenizer, row) == family.learnt(chat)


@pytest.mark.parametrize("template", [MISTRAL1, LLAMA2.replace("messages[1:]", "messages")])
def test_a_system_turn_goes_into_the_first_user_turn_where_it_must(template):
    tokenizer = with_tokens(template, (), bos="<s>", eos="</s>")
    made = render(example(CHATS["three"]), tokenizer)
    assert made.text.startswith("<s>[INST] Be brief.\n\nWhat is 1+1? [/INST]")
    assert not made.missing


def test_a_system_text_that_moves_with_the_turns_is_refused():
    tokenizer = with_tokens(MISTRAL3, ("[INST]", "[/INST]"), bos="<s>", eos="</s>")
    _, _, rows = trained(tokenizer, [example(CHATS["one"]), example(CHATS["two"])], "completion")
    assert learnt(tokenizer, rows[1]) == " It is 2.</s> It is 4.</s>"
    with pytest.raises(UserError, match=r"chat: got a chat template that rewrites earlier turns.*last-turn"):
        trained(tokenizer, [example(CHATS["three"])], "completion")
    _, [made], [row] = trained(tokenizer, [example(CHATS["three"])], "last-turn")
    assert learnt(tokenizer, row) == " Yes.</s>"
    assert "[INST] Be brief.\n\nSure?[/INST]" in made.text


def test_a_chat_that_the_models_own_template_refuses_is_refused():
    """TRL's templates are looser: the model would never see such a chat again."""
    tokenizer = tokenizer_of(Family("llama3", "training", "", "<|eot_id|>"))
    with pytest.raises(UserError, match="'bos_token' is undefined"):
        trained(tokenizer, [example(CHATS["one"])], "completion")


def test_an_answer_elsewhere_than_where_it_is_marked_is_told_and_never_learnt():
    swapped = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    )
    tokenizer = with_tokens(swapped, (), eos="<|end|>")
    style = choose_style([example(CHATS["two"])], tokenizer, mask="completion")
    assert style.marked is None  # the sample shows that its markers are no use
    from peftkit.data.chat.template import Style

    made = render(example(CHATS["two"]), tokenizer, Style("the model's own", swapped, "its markers"))
    assert made.answers == ()
    assert "is not where" in made.missing


def test_a_tokenizer_without_an_end_token_is_named_where_one_is_needed():
    tokenizer = with_tokens(FALCON, (), eos="<|end|>")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"chat: got a tokenizer without an eos token.*data.chat.end_token"):
        trained(tokenizer, [example(CHATS["one"])], "completion")


def test_text_that_closes_with_an_added_token_gets_an_end_token():
    tokenizer = with_tokens(FALCON, (), ("</tool_call>",), eos="<|endoftext|>")
    chat = (said("user", "q"), said("assistant", "f()</tool_call>"))
    _, _, [row] = trained(tokenizer, [example(chat)], "completion")
    assert learnt(tokenizer, row) == " f()</tool_call><|endoftext|>"


def test_of_several_templates_chats_with_tools_take_theirs():
    both = {"default": OUTSIDE, "tool_use": "{{ 'tools: ' + tools[0].function.name + '\n' }}" + CHATML}
    tokenizer = with_tokens(OUTSIDE, IM, eos="<|im_end|>")
    tokenizer.chat_template = both
    asked = (said("user", "q"), said("assistant", ""), said("tool", "3"), said("assistant", "It is 3."))
    style, rendered, rows = trained(tokenizer, [example(CHATS["two"]), example(asked)], "completion")
    assert way_of(style) == "markers"
    assert learnt(tokenizer, rows[0]) == "It is 2.<|im_end|>It is 4.<|im_end|>"
    assert rendered[1].text.startswith("tools: add\n<|im_start|>user\nq")
    assert learnt(tokenizer, rows[1]) == "<|im_end|>It is 3.<|im_end|>"
    assert render_prompt(example(TOOLS), tokenizer)[0].startswith("tools: add\n")


def test_truncation_and_padding_of_the_file_are_without_effect():
    tokenizer = with_tokens(CHATML, IM, eos="<|im_end|>")
    plain = tokenize([render(example(CHATS["three"]), tokenizer)], tokenizer, mask="completion")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=512)
    assert tokenize([render(example(CHATS["three"]), tokenizer)], tokenizer, mask="completion") == plain
    odd = [render(example((said("user", "q"), said("assistant", "\n\n\nx"))), tokenizer)]
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert learnt(tokenizer, tokenize(odd, tokenizer, mask="completion")[0]) == "\n\n\nx<|im_end|>"


def test_an_answer_that_begins_inside_a_token_is_encoded_alone():
    tokenizer = with_tokens(VICUNA.replace("' ASSISTANT:' }}", "' ASSISTANT: ' }}"), (), eos="</s>")
    chat = (said("user", "q"), said("assistant", "It is"))
    [whole] = encode([render(example(chat), tokenizer)], tokenizer)
    assert "ĠIt" in whole.tokens  # the prompt's blank and the answer's first word are one token
    _, _, [row] = trained(tokenizer, [example(chat)], "completion")
    assert learnt(tokenizer, row) == "It is</s>"
    prompt = render_prompt(example(chat), tokenizer)[0]
    assert before_last(row) == tokenizer(prompt)["input_ids"]


def test_blanks_that_end_a_prompt_are_the_tokens_of_the_prompt_alone():
    """GPT-2's pattern splits the blanks before a word, but not those at the end of a text."""
    tokenizer = with_tokens(ALPACA.replace("Response:\n", "Response:\n\n"), (), eos="</s>")
    _, _, [row] = trained(tokenizer, [example(CHATS["one"])], "completion")
    prompt = render_prompt(example(CHATS["one"]), tokenizer)[0]
    assert before_last(row) == tokenizer(prompt)["input_ids"]
    assert learnt(tokenizer, row) == "Japón 日本 🙂</s>"


LINES = ["What is 1+1? It is 2. And 2+2? It is 4.", "USER: q ASSISTANT: Yes. Sure? A chat. Be brief. [INST] [/INST]"]


def sentencepiece(model, scheme):
    """A small tokenizer after SentencePiece's manner: words carry the blank before them as ▁."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(set("".join(LINES)) | {"▁", "\n"})
    if model == "bpe":
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        )
    else:
        made = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>",
            initial_alphabet=alphabet, show_progress=False,
        )  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.train_from_iterator(LINES * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def pieces(tokenizer, row):
    """What is learnt, by the tokens' own text: decoding takes the first blank off."""
    text = "".join(tokenizer.convert_ids_to_tokens([token for token in row.labels if token != IGNORE_INDEX]))
    return text.replace("▁", " ")


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_tokens_that_carry_the_blank_before_them_are_learnt_with_the_answer(model, scheme):
    tokenizer = sentencepiece(model, scheme)
    tokenizer.chat_template = LLAMA2
    _, _, [row] = trained(tokenizer, [example(CHATS["two"])], "completion")
    assert pieces(tokenizer, row) == " It is 2. </s> It is 4. </s>"
    tokenizer.chat_template = VICUNA
    _, _, [row] = trained(tokenizer, [example(CHATS["two"])], "completion")
    assert pieces(tokenizer, row) == " It is 2.</s> It is 4.</s>"


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_no_blank_is_put_before_an_answer_whose_prompt_ends_in_one(model, scheme):
    tokenizer = sentencepiece(model, scheme)
    tokenizer.chat_template = VICUNA.replace("' ASSISTANT:' }}", "' ASSISTANT: ' }}")
    _, _, [row] = trained(tokenizer, [example(CHATS["two"])], "last-turn")
    assert pieces(tokenizer, row) == "It is 4.</s>"
    prompt, _ = render_prompt(example(CHATS["two"]), tokenizer)
    assert before_last(row) == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_weights_of_turns_and_rows():
    tokenizer = with_tokens(CHATML, IM, eos="<|im_end|>")
    chat = (*CHATS["two"][:1], {**CHATS["two"][1], "weight": 0}, *CHATS["two"][2:])
    _, _, [row] = trained(tokenizer, [example(chat)], "completion")
    assert learnt(tokenizer, row) == "It is 4.<|im_end|>"
    assert row.weights is None
    chat = (*CHATS["two"][:1], {**CHATS["two"][1], "weight": 0.5}, *CHATS["two"][2:])
    _, _, [row] = trained(tokenizer, [example(chat, weight=2.0)], "completion")
    by_weight = {weight: [] for weight in (1.0, 2.0)}
    for label, weight in zip(row.labels, row.weights, strict=True):
        if label != IGNORE_INDEX:
            by_weight[weight].append(label)
    assert {weight: tokenizer.decode(ids) for weight, ids in by_weight.items()} == {
        1.0: "It is 2.<|im_end|>",
        2.0: "It is 4.<|im_end|>",
    }
    chat = (*CHATS["two"][:3], {**CHATS["two"][3], "weight": 0})
    falcon = with_tokens(FALCON, (), eos="<|end|>")
    _, _, [row] = trained(falcon, [example(chat)], "completion")
    assert learnt(falcon, row) == " It is 2."  # no end token far from what is learnt
    _, _, [row] = trained(tokenizer, [example(CHATS["one"], weight=0.0)], "completion")
    assert row.num_learnt == 0


def test_the_weight_of_an_added_end_token_is_the_answers():
    tokenizer = with_tokens(FALCON, (), bos="<s>", eos="<|end|>", adds_bos=True)
    _, _, [row] = trained(tokenizer, [example(CHATS["one"], weight=0.5)], "completion")
    assert len(row.weights) == len(row.labels) == len(row.input_ids)
    assert {w for w, label in zip(row.weights, row.labels, strict=True) if label != IGNORE_INDEX} == {0.5}
    assert row.input_ids[0] == tokenizer.bos_token_id


def test_given_turns_are_never_learnt():
    tokenizer = with_tokens(CHATML, IM, eos="<|im_end|>")
    for mask in ("completion", "last-turn"):
        _, _, [row] = trained(tokenizer, [example(CHATS["two"], num_given=3)], mask)
        assert learnt(tokenizer, row) == "It is 4.<|im_end|>"


def test_chat_settings_put_a_system_turn_and_drop_reasoning(tmp_path):
    from peftkit.data.rows.ingest import ingest
    from peftkit.recipe.schema import Data

    path = tmp_path / "d.jsonl"
    chat = [said("user", "q"), said("assistant", "<think>\nhm\n</think>\n\nyes", reasoning_content="hm")]
    path.write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    found = {}
    for thinking in ("keep", "drop"):
        settings = {"system": "Be brief.", "thinking": thinking}
        data = Data(train=str(path), eval=None, chat=settings)
        examples = ingest(data, seed=0, where=str)
        tokenizer = with_tokens(CHATML, IM, eos="<|im_end|>")
        _, [made], [row] = trained(tokenizer, list(examples.train), "completion")
        assert made.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n")
        found[thinking] = learnt(tokenizer, row)
    assert found == {"keep": "<think>\nhm\n</think>\n\nyes<|im_end|>", "drop": "yes<|im_end|>"}


def test_reasoning_that_a_template_takes_out_of_the_text_is_named():
    tokenizer = with_tokens(CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +"), IM, eos=IM[0])
    chat = (said("user", "q"), said("assistant", "<think>hm</think>yes"))
    assert render(example(chat), tokenizer).missing_reasoning == "the reasoning of turn 2"


def test_reasoning_that_a_template_writes_otherwise_is_kept():
    tokenizer = tokenizer_of(next(family for family in FAMILIES if family.name == "qwen3"))
    chat = (said("user", "q"), said("assistant", "<think>hm</think>yes"))
    _, [made], [row] = trained(tokenizer, [example(chat)], "completion")
    assert learnt(tokenizer, row) == "<think>\nhm\n</think>\n\nyes<|im_end|>"
    assert not made.missing_reasoning


def test_a_base_without_a_template_learns_by_the_default_one():
    tokenizer = deepcopy(tiny())
    tokenizer.chat_template = None
    style, _, [row] = trained(tokenizer, [example(CHATS["two"])], "completion")
    assert style.source == "the default"
    assert learnt(tokenizer, row) == "It is 2.<|end|>It is 4.<|end|>"


def test_text_without_a_template_ends_in_whatever_special_token_it_has():
    tokenizer = deepcopy(tiny())
    tokenizer.chat_template = None
    for text, more in (("a<|user|>", ""), ("a", "<|end|>"), ("a<|end|>\n", "")):
        [row] = tokenize([render(Example("w", completion=text), tokenizer)], tokenizer, mask="all")
        assert learnt(tokenizer, row) == text + more


def test_a_template_in_a_file_is_read_and_its_mistakes_are_told(tmp_path):
    from peftkit.data.chat.spans import read_template

    good = "{% generation %}{{ bos_token }}{% endgeneration %}{{ raise_exception('x') }}"
    (tmp_path / "good.jinja").write_text(good)
    assert read_template(tmp_path / "good.jinja").startswith("{% generation %}")
    (tmp_path / "bad.jinja").write_text("one\n{% for m in messages %}")
    with pytest.raises(UserError, match=r"bad\.jinja:2: got .*expected a Jinja template"):
        read_template(tmp_path / "bad.jinja")
    with pytest.raises(UserError, match="which cannot be read"):
        read_template(tmp_path / "none.jinja")
