"""Rendering in the sandbox process gives what rendering here gives, in batches and line by line."""

import jinja2
import pytest

from peftkit.data.chat.template import DEFAULT_TEMPLATE
from peftkit.data.jinja import render
from peftkit.data.jinja.render import ChatRequest, render_chats, render_line
from peftkit.errors import UserError

CHATS = [[{"role": "user", "content": f"hi {i} \u2028é"}, {"role": "assistant", "content": "yes"}] for i in range(40)]


def test_a_batch_in_the_sandbox_equals_one_by_one_here(monkeypatch):
    requests = [ChatRequest(chat, None, {"eos_token": "</s>", "add_generation_prompt": i % 2 == 0})
                for i, chat in enumerate(CHATS)]  # fmt: skip
    here = [render_chats(DEFAULT_TEMPLATE, [request])[0] for request in requests]
    monkeypatch.setattr(render, "is_known_template", lambda template: False)
    assert render_chats(DEFAULT_TEMPLATE, requests) == here


def test_a_chat_that_is_refused_says_why_and_the_next_batch_is_rendered():
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}x"
    with pytest.raises(jinja2.TemplateError, match="not this"):
        render_chats(template, [ChatRequest([{"role": "user", "content": text}]) for text in ("a", "no", "b")])
    assert render_chats(template, [ChatRequest([{"role": "user", "content": "a"}])]) == [("x", [])]


def test_a_row_takes_a_line_and_lists_are_no_text():
    assert render_line("{{ title }}: {{ n + 1 }}", {"title": "Sums", "n": 1}) == "Sums: 2"
    with pytest.raises(jinja2.TemplateError, match="list in it"):
        render_line("{{ a }}", {"a": [1]})
    with pytest.raises(jinja2.TemplateError, match="'b' is undefined"):
        render_line("{{ b }}", {})


def test_a_limit_ends_the_batch_and_is_remembered(monkeypatch):
    monkeypatch.setattr(render, "TIMEOUT_SECONDS", 0.5)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ q }}"
    for _ in range(2):
        with pytest.raises(UserError, match=r"takes more than 0\.5 seconds for one row"):
            render_line(endless, {"q": 1})
    assert render_line("{{ q }}", {"q": 1}) == "1"
