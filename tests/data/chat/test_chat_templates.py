"""Masks are proven on the templates of real families: what is learnt, decoded, is the assistant's turns.

TRL's wheel carries the templates. Each family's tokenizer is the tiny one with that family's special tokens,
and each chat takes the way that training takes.
"""

import re
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.data.chat.spans import choose_style
from peftkit.data.chat.template import apply_template, render, render_prompt
from peftkit.data.formats import Example
from peftkit.data.tokens.mask import IGNORE_INDEX, tokenize
from tests.conftest import TINY_LLAMA

MARKERS = re.compile(
    r"<\|[^|<>\s'{]+\|?>|<[a-z_]+\|>|<｜[^｜]+｜>|</?(?:think|tool_call|tool_response)>|\[gMASK\]|<sop>"
    r"|<(?:start|end)_of_(?:turn|utterance)>|</s>"
)
WORDS = re.compile(r"</?(?:think|tool_call|tool_response)>")  # tokens that are added, but not special
BLANKS = "\n  lead and trail \n"


def said(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
TWO = (
    said("user", "What is 1+1?"),
    said("assistant", "It is 2."),
    said("user", "And 2+2?"),
    said("assistant", "It is 4."),
)
CHATS = {
    "one": (said("user", "Wie heißt 日本?"), said("assistant", "Japón 日本 🙂")),
    "two": TWO,
    "three": (said("system", "Be brief."), *TWO, said("user", "Sure?"), said("assistant", "Yes.")),
    "blanks": (said("user", "q"), said("assistant", BLANKS), said("user", " r "), said("assistant", " x\n\n")),
}
TOOLS = (
    said("user", "q"),
    said("assistant", "", tool_calls=[CALL]),
    said("tool", "3", name="add"),
    said("assistant", "It is 3."),
)
REASONS = (
    said("user", "q"),
    said("assistant", "It is 2.", reasoning_content="Add."),
    said("user", "r"),
    said("assistant", "It is 4.", reasoning_content="Again."),
)


@dataclass(frozen=True)
class Family:
    """A template with its tokens, and what is to be learnt, written by hand.

    `turn` is what is learnt of an answer, `last` of the last one where that differs. `tools` and `reasons`
    are what is learnt of the chats of these names, None where the template knows no such thing.
    """

    name: str
    way: str  # "markers" | "training" | "prefixes"
    turn: str
    eos: str
    bos: str | None = None
    last: str | None = None
    stops: tuple[str, ...] = ()
    trims: object = str
    tools: str | None = None
    reasons: str | None = None
    last_way: str = ""  # of the mask last-turn, where it is another
    last_turn: str = ""  # learnt of the last turn there, where it is another
    own_text: bool = True  # whether training sees what the model's own template writes
    prefix: bool = True  # whether the model's own prompt is a prefix of the text
    template: str = field(default="", repr=False)

    def learnt(self, chat, mask="completion"):
        said = [self.trims(m["content"]) for m in chat if m["role"] == "assistant"]
        if mask == "last-turn":
            return (self.last_turn or self.last or self.turn).format(said[-1])
        return "".join(self.turn.format(a) for a in said[:-1]) + (self.last or self.turn).format(said[-1])


def _gemma4(name, tools, way="prefixes"):
    return Family(
        name, way, "{}<turn|>", "<eos>", "<bos>", stops=("<turn|>", "<|tool_response>"), trims=str.strip, tools=tools
    )


def _nemotron(name, reasons):
    # the prompt opens the reasoning; an answer without any closes it at once, as the template writes it
    call = (
        "</think>\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx\n"
        "</parameter>\n"
        "</function>\n</tool_call>\n<|im_end|>"
    )
    return Family(
        name,
        "training",
        "</think>{}<|im_end|>",
        "<|im_end|>",
        "<s>",
        trims=str.rstrip,
        prefix=False,
        tools=f"{call}</think>It is 3.<|im_end|>",
        reasons=reasons,
    )


QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x"}}\n</tool_call><|im_end|>'
XML_CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx\n</parameter>\n"
    "</function>\n"
    "</tool_call><|im_end|>"
)
EMPTY = "<think>\n\n</think>\n\n"
LLAMA_CALL = '{"name": "add", "parameters": {"a": 1, "b": "x"}}<|eot_id|>'
LFM_CALL = "<|tool_call_start|>[add(a=1, b='x')]<|tool_call_end|><|im_end|>"
GEMMA_CALL = '<|tool_call>call:add{a:1,b:<|"|>x<|"|>}<tool_call|>'
GLM_CALL = (
    "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    "<arg_key>b</arg_key>\n<arg_value>x</arg_value>\n</tool_call><|observation|>"
)
MUSE_CALL = (
    ' to=add<|message|><atem:function_calls>\n<atem:invoke name="add">\n'
    '<atem:parameter name="a">1</atem:parameter>\n'
    '<atem:parameter name="b">x</atem:parameter>\n</atem:invoke>\n</atem:function_calls><|eot|>'
)
IM = "{}<|im_end|>"
DEEPSEEK = "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"

FAMILIES = [
    Family("cohere", "training", "{}<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", trims=str.strip),
    Family("cohere2", "training", "{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
    # its prompt opens the reasoning, but its chats have none: the header alone is prompt
    Family("deepseek_r1_distill", "training", "{}" + DEEPSEEK[0], *DEEPSEEK, prefix=False),
    Family("deepseekv3", "training", "{}" + DEEPSEEK[0], *DEEPSEEK, prefix=False),
    Family("gemma", "training", "{}<end_of_turn>", "<eos>", "<bos>", stops=("<end_of_turn>",), trims=str.strip),
    Family("gemma3", "training", "{}<end_of_turn>", "<eos>", "<bos>", stops=("<end_of_turn>",), trims=str.strip),
    # after a tool's answer the prompt is bare, and this template opens the turn again
    _gemma4("diffusion_gemma", f"{GEMMA_CALL}<|tool_response><|turn>model\nIt is 3.<turn|>", "training"),
    _gemma4("gemma4", f"{GEMMA_CALL}<|tool_response>It is 3.<turn|>"),
    _gemma4("gemma4_v2", f"{GEMMA_CALL}<turn|>It is 3.<turn|>"),
    _gemma4("gemma4_v3", f"{GEMMA_CALL}<|tool_response>It is 3.<turn|>"),
    _gemma4("gemma4_v4", f"{GEMMA_CALL}<|tool_response>It is 3.<turn|>"),
    _gemma4("gemma4_v5", f"{GEMMA_CALL}<|tool_response>It is 3.<turn|>"),
    # no end token of its own: it stops where the next turn begins
    Family(
        "glm4moe",
        "prefixes",
        "\n<think></think>\n{}<|user|>",
        "<|endoftext|>",
        last="\n<think></think>\n{}<|endoftext|>",
        stops=("<|user|>", "<|observation|>"),
        trims=str.strip,
        tools=f"{GLM_CALL}\n<think></think>\nIt is 3.<|endoftext|>",
    ),
    Family(
        "gptoss",
        "training",
        "<|channel|>final<|message|>{}<|end|>",
        "<|return|>",
        "<|startoftext|>",
        last="<|channel|>final<|message|>{}<|return|>",
        stops=("<|call|>", "<|endoftext|>"),
        tools=' to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": "x"}<|call|>'
        "<|channel|>final<|message|>It is 3.<|return|>",
        reasons="<|channel|>final<|message|>It is 2.<|end|><|channel|>analysis<|message|>Again.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
    ),
    Family("idefics3", "training", " {}<end_of_utterance>", "<|end_of_text|>", stops=("<end_of_utterance>",)),
    Family("lfm2", "training", IM, "<|im_end|>", "<|startoftext|>"),
    Family("lfm2_v2", "training", IM, "<|im_end|>", "<|startoftext|>", tools=f"{LFM_CALL}It is 3.<|im_end|>"),
    *(
        Family(
            name,
            "markers",
            IM,
            "<|im_end|>",
            "<|startoftext|>",
            tools=f"{LFM_CALL}It is 3.<|im_end|>",
            reasons="It is 2.<|im_end|><think>Again.</think>It is 4.<|im_end|>",
        )
        for name in ("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl")
    ),
    Family("llama3", "training", "{}<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", trims=str.strip),
    *(
        Family(
            name,
            "prefixes",
            "{}<|eot_id|>",
            "<|eot_id|>",
            "<|begin_of_text|>",
            trims=str.strip,
            stops=("<|eom_id|>", "<|end_of_text|>"),
            tools=f"{LLAMA_CALL}It is 3.<|eot_id|>",
        )
        for name in ("llama3_1", "llama3_2")
    ),
    Family("llava_next", "training", " {}</s>", "</s>", "<s>"),
    Family(
        "muse_glimmer",
        "training",
        " to=user<|message|>{}<|eot|>",
        "<|eot|>",
        "<|begin_of_text|>",
        tools=f"{MUSE_CALL} to=user<|message|>It is 3.<|eot|>",
        reasons=" to=self<|message|>Add.<|eom|><|start|>assistant to=user<|message|>It is 2.<|eot|>"
        " to=self<|message|>Again.<|eom|><|start|>assistant to=user<|message|>It is 4.<|eot|>",
    ),
    _nemotron("nemotron_3_nano", "</think>\nIt is 2.<|im_end|>Again.\n</think>\nIt is 4.<|im_end|>"),
    _nemotron("nemotron_3_super", "</think>\nIt is 2.<|im_end|>Again.\n</think>\nIt is 4.<|im_end|>"),
    _nemotron("nemotron_3_ultra", "</think>It is 2.<|im_end|>Again.</think>It is 4.<|im_end|>"),
    _nemotron("nemotron_3_5_lightning", "</think>It is 2.<|im_end|>Again.</think>It is 4.<|im_end|>"),
    # the end-of-text token that it writes after the last turn is never generated: <|end|> stops before it
    *(
        Family(name, "training", "{}<|end|>", "<|endoftext|>", "<s>", stops=("<|end|>", "<|assistant|>"))
        for name in ("phi3", "phi3_5")
    ),
    Family("qwen2_5", "training", IM, "<|im_end|>", tools=f"{QWEN_CALL}It is 3.<|im_end|>"),
    Family("qwen2_5_vl", "training", IM, "<|im_end|>"),
    # its own template takes the reasoning out of all turns but the last; TRL's keeps it
    Family(
        "qwen3",
        "training",
        EMPTY + IM,
        "<|im_end|>",
        trims=lambda t: t.lstrip("\n"),
        own_text=False,
        last_way="prefixes",
        tools=f"{EMPTY}{QWEN_CALL}{EMPTY}It is 3.<|im_end|>",
        reasons="<think>\nAdd.\n</think>\n\nIt is 2.<|im_end|><think>\nAgain.\n</think>\n\nIt is 4.<|im_end|>",
    ),
    Family(
        "qwen3_5_nothink",
        "training",
        IM,
        "<|im_end|>",
        trims=str.strip,
        own_text=False,
        last_way="prefixes",
        tools=f"{XML_CALL}It is 3.<|im_end|>",
    ),
    *(
        Family(
            name,
            "training",
            "\n</think>\n\n" + IM,
            "<|im_end|>",
            trims=str.strip,
            own_text=False,
            last_way="prefixes",
            tools=f"\n</think>\n\n{XML_CALL}\n</think>\n\nIt is 3.<|im_end|>",
            reasons="Add.\n</think>\n\nIt is 2.<|im_end|>Again.\n</think>\n\nIt is 4.<|im_end|>",
        )
        for name in ("qwen3_5_think", "qwen3_6")
    ),
    Family(
        "qwen3_8",
        "training",
        "\n</think>\n\n" + IM,
        "<|im_end|>",
        trims=str.strip,
        tools=f"\n</think>\n\n{XML_CALL}\n</think>\n\nIt is 3.<|im_end|>",
        reasons="Add.\n</think>\n\nIt is 2.<|im_end|>Again.\n</think>\n\nIt is 4.<|im_end|>",
    ),
    Family("qwen3_instruct_2507", "training", IM, "<|im_end|>", tools=f"{QWEN_CALL}It is 3.<|im_end|>"),
    Family("qwen3_vl", "training", IM, "<|im_end|>", tools=f"{QWEN_CALL}It is 3.<|im_end|>"),
    Family("smolvlm", "training", " {}<end_of_utterance>", "<end_of_utterance>", "<|im_start|>"),
]
WAYS = {"its generation": "markers", "TRL's": "training", "what is added": "prefixes"}


@cache
def tiny():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def with_tokens(template, special, words=(), *, bos=None, eos, adds_bos=False):
    """The tiny tokenizer with a template and its tokens; `adds_bos` as real tokenizers begin plain text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AddedToken

    made = deepcopy(tiny())
    made.chat_template = template
    names = [*special, eos, *([bos] if bos else [])]
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(names)])
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in words])
    made.eos_token = eos
    if bos:
        made.bos_token = bos
    if bos and adds_bos:
        pair = [(bos, made.bos_token_id)]
        made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
    return made


@cache
def tokenizer_of(family):
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{family.name}.jinja"
    template = family.template or path.read_text(encoding="utf-8")
    found = sorted(set(MARKERS.findall(template)) | set(family.stops))
    words = [name for name in found if WORDS.fullmatch(name)]
    special = [name for name in found if name not in words]
    return with_tokens(template, special, words, bos=family.bos, eos=family.eos, adds_bos=True)


def example(chat, **more):
    tools = (ADD,) if any(m["role"] == "tool" for m in chat) else ()
    return Example("chat", messages=tuple(chat), tools=tools, **more)


def trained(tokenizer, examples, mask, stops=()):
    """(style, rendered examples, rows) as training has them."""
    ids = frozenset(tokenizer.convert_tokens_to_ids(list(stops)))
    style = choose_style(examples, tokenizer, mask=mask)
    rendered = [render(e, tokenizer, style, mask=mask) for e in examples]
    return style, rendered, tokenize(rendered, tokenizer, mask=mask, stops=ids)


def way_of(style):
    return next(way for start, way in WAYS.items() if style.reason.startswith(start))


def learnt(tokenizer, row):
    assert len(row.input_ids) == len(row.labels)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    return tokenizer.decode([token for token in row.labels if token != IGNORE_INDEX])


def before_last(row):
    """The tokens before the last learnt answer."""
    end = max(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX) + 1
    start = max((i for i in range(end) if row.labels[i] == IGNORE_INDEX), default=-1) + 1
    return row.input_ids[:start]


def by_name(families):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


@by_name(FAMILIES)
def test_learnt_are_the_answers_with_their_end_tokens(family):
    tokenizer = tokenizer_of(family)
    examples = [example(chat) for chat in CHATS.values()]
    for mask in ("completion", "assistant", "last-turn"):
        style, rendered, rows = trained(tokenizer, examples, mask, family.stops)
        other = mask == "last-turn" and family.last_way
        assert way_of(style) == (other or family.way)
        for (name, chat), row in zip(CHATS.items(), rows, strict=True):
            assert learnt(tokenizer, row) == family.learnt(chat, mask), (name, mask)
        if family.own_text or other:
            own = [
                apply_template(tokenizer, e.messages, e.tools, add_generation_prompt=False, where="") for e in examples
            ]
            assert [one.text for one in rendered] == own


@by_name(FAMILIES)
def test_everything_is_learnt_and_ends_in_an_end_token(family):
    tokenizer = tokenizer_of(family)
    _, rendered, rows = trained(tokenizer, [example(chat) for chat in CHATS.values()], "all", family.stops)
    for made, row in zip(rendered, rows, strict=True):
        whole = learnt(tokenizer, row)
        if made.text.startswith(family.bos or "\0"):
            assert row.input_ids.count(tokenizer.bos_token_id) == 1 + made.text[1:].count(family.bos)
        assert whole in (made.text, made.text + family.eos)
        assert whole.rstrip().endswith((family.eos, *family.stops))


@by_name(FAMILIES)
def test_what_stands_before_an_answer_is_the_prompt_for_it(family):
    """Training and inference see the same tokens."""
    tokenizer = tokenizer_of(family)
    examples = [example(chat) for chat in CHATS.values()]
    _, rendered, rows = trained(tokenizer, examples, "last-turn", family.stops)
    for one, made, row in zip(examples, rendered, rows, strict=True):
        prompt, _ = render_prompt(one, tokenizer)
        assert made.text.startswith(prompt) == family.prefix
        if family.prefix:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            bos = tokenizer("")["input_ids"]
            assert before_last(row) == (ids if ids[:1] == bos or not bos else bos + ids)


@by_name([family for family in FAMILIES if family.tools])
def test_tool_calls_are_learnt_and_what_tools_say_is_not(family):
    tokenizer = tokenizer_of(family)
    _, [made], [row] = trained(tokenizer, [example(TOOLS)], "completion", family.stops)
    assert learnt(tokenizer, row) == family.tools
    assert not made.missing


@by_name([family for family in FAMILIES if family.reasons])
def test_reasoning_is_learnt_where_the_template_keeps_it(family):
    tokenizer = tokenizer_of(family)
    _, [made], [row] = trained(tokenizer, [example(REASONS)], "completion", family.stops)
    assert learnt(tokenizer, row) == family.reasons
    assert made.missing_reasoning == ("" if "Add." in family.reasons else "the reasoning of turn 2")


def test_every_template_of_the_wheel_is_proven():
    import trl

    names = {path.stem for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
    originals = {name for name in names if not name.endswith("_training")}
    assert originals == {family.name for family in FAMILIES}


RANDOM = ("gptoss", "llama3", "llama3_1", "phi3", "qwen2_5", "qwen3")
words = st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda text: text.strip() and not set(text) & set("<>[]")
)


@pytest.mark.parametrize("name", RANDOM)
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3))
@settings(max_examples=25)
def test_any_chat_learns_exactly_its_answers(name, turns):
    family = next(family for family in FAMILIES if family.name == name)
    chat = tuple(said(role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True))
    tokenizer = tokenizer_of(family)
    style, _, [row] = trained(tokenizer, [example(chat)], "completion", family.stops)
    assert way_of(style) == family.way
    assert learnt(tokenizer, row) == family.learnt(chat)
