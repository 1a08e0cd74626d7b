"""Rendering in the sandbox process gives what rendering here gives, in batches and line by line."""

import threading

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


def test_requests_larger_than_pipes_and_groups_are_rendered():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "書" * 3000} for _ in range(60)]
    requests = [ChatRequest(turns[: n + 1]) for n in range(60)]  # 33 million characters as JSON
    assert [len(text) for text, _ in render_chats(template, requests)] == [3000 * (n + 1) for n in range(60)]


def test_a_process_killed_from_outside_is_started_again():
    template = "{{ messages[0].content }}."
    request = ChatRequest([{"role": "user", "content": "a"}])
    for _ in range(2):
        assert render_chats(template, [request]) == [("a.", [])]
        render._SANDBOX.process.kill()
    assert render_line("{{ q }}", {"q": 1}) == "1"
    process = render._SANDBOX.process
    threading.Timer(0.5, process.kill).start()
    slow = "{% for a in range(3000) %}{% for b in range(9000) %}{% endfor %}{% endfor %}{{ q }}"
    assert render_line(slow, {"q": 1}) == "1"
    assert render._SANDBOX.process is not process


def test_an_interrupted_batch_leaves_no_answers_behind(monkeypatch):
    template, read = "{{ messages[0].content }}!", render._SANDBOX._read_line
    requests = [ChatRequest([{"role": "user", "content": f"row {n}"}]) for n in range(2000)]
    lines = []

    def interrupted(seconds):
        lines.append(read(seconds))
        if len(lines) == 5:
            raise KeyboardInterrupt
        return lines[-1]

    monkeypatch.setattr(render._SANDBOX, "_read_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_chats(template, requests)
    monkeypatch.undo()
    assert render_chats(template, [ChatRequest([{"role": "user", "content": "new"}])]) == [("new!", [])]


def test_a_limit_ends_the_batch_and_is_remembered(monkeypatch):
    monkeypatch.setattr(render, "TIMEOUT_SECONDS", 0.5)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ q }}"
    for _ in range(2):
        with pytest.raises(UserError, match=r"takes more than 0\.5 seconds for one row"):
            render_line(endless, {"q": 1})
    assert render_line("{{ q }}", {"q": 1}) == "1"
