"""Tool calls through every chat template of TRL: the text is transformers' own, and the spans are the answers."""

import json
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from peftkit.data.chat.spans import choose_style
from peftkit.data.chat.template import apply_template, render, tool_call_form
from peftkit.data.formats import Example
from peftkit.data.formats.chat import parse_turns
from peftkit.errors import UserError
from tests.conftest import TINY_LLAMA

TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
ARGUMENTS = '{"city": "Paris"}'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS}}
]


def turns(arguments, content):
    call = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "name": "get_weather", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "It is sunny."},
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def rendered_by_transformers(tokenizer):
    """The texts of the row as it is, and in the forms that templates are written for, where the call stands in them."""
    texts = []
    for arguments in (ARGUMENTS, json.loads(ARGUMENTS)):
        for content in (None, ""):
            try:
                text = tokenizer.apply_chat_template(turns(arguments, content), tools=TOOLS, tokenize=False)
            except Exception:  # noqa: BLE001  templates raise what they like
                continue
            if "Paris" in text:
                texts.append(text)
    return texts


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tool_call_is_rendered_as_transformers_does(name, tokenizer):
    tokenizer.chat_template = TEMPLATES[name].read_text()
    expected = rendered_by_transformers(tokenizer)
    messages = parse_turns(turns(ARGUMENTS, None), "messages")
    if not expected:  # the template knows no tools, or loses the call
        try:
            rendered = render(Example("row", messages=messages, tools=tuple(TOOLS)), tokenizer)
        except UserError:
            return
        assert "Paris" in rendered.text or rendered.missing, "the check tells what the template drops"
        return
    text = apply_template(tokenizer, messages, TOOLS, add_generation_prompt=False, where="row")
    assert text in expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith("_training")])
def test_the_spans_of_tool_rows_are_the_answers(name, tokenizer):
    tokenizer.chat_template = TEMPLATES[name].read_text()
    if not rendered_by_transformers(tokenizer):
        pytest.skip("the template knows no tools")
    messages = parse_turns(turns(ARGUMENTS, None), "messages")
    example = Example("row", messages=messages, tools=tuple(TOOLS))
    style = choose_style([example], tokenizer, mask="completion")
    rendered = render(example, tokenizer, style)
    call, answer = (rendered.text[span.start : span.end] for span in rendered.answers)
    assert "get_weather" in call
    assert "Paris" in call
    assert "It is sunny." in answer
    assert "sunny" not in call
    assert not rendered.missing


def test_deepseek_v3_takes_arguments_as_text(tokenizer):
    assert tool_call_form(TEMPLATES["deepseekv3"].read_text())[0]
    assert tool_call_form(TEMPLATES["qwen3"].read_text()) == (False, False)
