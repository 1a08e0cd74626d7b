"""Examples as text, with the spans that answers cover. Training and generation render the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from peftkit.data.formats import Example, Message
from peftkit.errors import Problem, UserError

# For bases that bring no chat template. Stored with the adapter, so that inference renders alike.
DEFAULT_TEMPLATE = (
    "{% if tools %}Tools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}\n{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Assistant:\n{{ message['content'] }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}{{ eos_token }}\n\n"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'tool' %}### Tool:\n{{ message['content'] }}\n\n"
    "{% else %}### User:\n{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
_PROBE = "peftkit probe"


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of an answer, and its weight in the loss."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Rendered:
    """An example as the model sees it, and where its answers stand, first to last.

    `lost` says what of the example the text does not hold, `lost_reasoning` whose reasoning.
    """

    text: str
    answers: tuple[Span, ...]
    where: str
    lost: str = ""
    lost_reasoning: str = ""


@dataclass(frozen=True)
class Style:
    """How chats become text. `marked` is a template whose generation markers give the spans.

    Without one, spans come from rendering prefixes: what the template adds for an answer beyond the prompt
    for it. `reason` says why.
    """

    source: str  # "the model's own" | "the default" | a file
    marked: str | None
    reason: str


NO_CHATS = Style("none", None, "no chats in the data")


def ensure_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the default one. Returns whether it was needed."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return True


def template_of(tokenizer: Any) -> str:
    """The template that chats are rendered with, where a tokenizer brings several the default one."""
    found = tokenizer.chat_template
    return str(found["default"] if isinstance(found, Mapping) and "default" in found else found)


@lru_cache(maxsize=32)
def takes_system(template: str) -> bool:
    """Whether a template renders a system turn: some refuse it, some leave it out."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "hi"}]
    try:
        [text], _ = render_jinja_template([turns], chat_template=template, bos_token="", eos_token="")
    except (jinja2.TemplateError, TypeError):
        return False
    return _PROBE in text


def _turns(messages: Sequence[Message], tokenizer: Any) -> list[Message]:
    """The turns as the template takes them: a system prompt goes into the first user turn where it must."""
    if messages and messages[0]["role"] == "system" and not takes_system(template_of(tokenizer)):
        if len(messages) > 1 and messages[1]["role"] == "user":
            both = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            return [{**messages[1], "content": both}, *messages[2:]]
        return list(messages[1:])
    return list(messages)


def _refused(where: str, error: Exception) -> UserError:
    got = f"a chat that the model's template refuses ({error})"
    return UserError(Problem(where, got, "turns in the order that the template knows"))


def apply(tokenizer: Any, messages: Sequence[Message], tools: Any, *, ask: bool, where: str) -> str:
    """A chat as the tokenizer's template writes it; with `ask` up to where an answer begins."""
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(
                _turns(messages, tokenizer), tools=tools, tokenize=False, add_generation_prompt=ask
            )
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise _refused(where, error) from None


def _weights(example: Example) -> list[float]:
    """The weights of the answers that are learnt, first to last."""
    return [
        float(message.get("weight", 1.0)) * example.weight
        for message in example.messages[example.num_given :]
        if message["role"] == "assistant"
    ]


def by_markers(example: Example, tokenizer: Any, template: str) -> Rendered:
    """Text and spans by the template's generation markers: one rendering."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = _turns(example.messages, tokenizer)
    try:
        [text], [spans] = render_jinja_template(
            [turns],
            tools=list(example.tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise _refused(example.where, error) from None
    num_answers = sum(m["role"] == "assistant" for m in example.messages)
    if len(spans) != num_answers:
        got = f"{len(spans)} marked answers of {num_answers}"
        raise UserError(Problem(example.where, got, "a template that marks every answer once"))
    weights = _weights(example)
    chosen = spans[num_answers - len(weights) :]
    answers = tuple(Span(a, b, w) for (a, b), w in zip(chosen, weights, strict=True))
    return Rendered(text, answers, example.where)


def by_prefixes(example: Example, tokenizer: Any, *, last_only: bool) -> Rendered:
    """Text and spans by rendering what comes before each answer with the prompt for it, and up to its end."""
    tools, where = list(example.tools) or None, example.where
    text = apply(tokenizer, example.messages, tools, ask=False, where=where)
    places = [
        i for i, m in enumerate(example.messages) if m["role"] == "assistant" and i >= example.num_given
    ]
    pairs = list(zip(places, _weights(example), strict=True))
    answers = []
    for i, weight in pairs[-1:] if last_only else pairs:
        before = apply(tokenizer, example.messages[:i], tools, ask=True, where=where)
        is_last = i + 1 == len(example.messages)
        after = (
            text if is_last else apply(tokenizer, example.messages[: i + 1], tools, ask=False, where=where)
        )
        if not (after.startswith(before) and text.startswith(after)):
            got, fix = (
                "a chat template that rewrites earlier turns",
                "use data.mask: last-turn, or another template",
            )
            raise UserError(Problem(where, got, "a template whose prompt is a prefix of the whole chat", fix))
        answers.append(Span(len(before), len(after), weight))
    return Rendered(text, tuple(answers), where)


def _said(content: str) -> str:
    """What of an answer every template keeps: some take the reasoning out."""
    return content.rsplit("</think>", 1)[-1].strip()


def _outside(rendered: Rendered) -> str:
    """The text without what is learnt of it: there stands what others said."""
    edges = [0, *(edge for span in rendered.answers for edge in (span.start, span.end)), len(rendered.text)]
    return "".join(rendered.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))


def _end_in(text: str, content: str, start: int) -> int:
    """Where a content that stands at `start` or later ends, as it is or as JSON; -1 where it does not."""
    for form in (str, _said, lambda said: json.dumps(said, ensure_ascii=False)[1:-1]):
        place = text.find(form(content), start)
        if place >= 0:
            return place + len(form(content))
    return -1


def lost_in(example: Example, rendered: Rendered) -> str:
    """What of a chat its text does not hold; empty where all is there.

    What others than the assistant say has to stand outside the answers, in its order: a tool's "24" stands in
    the answer as well.
    """
    text, outside, at = rendered.text, _outside(rendered), 0
    for number, message in enumerate(example.messages, start=1):
        content = message["content"].strip()
        if message["role"] in {"user", "tool"}:
            at = _end_in(outside, content, at)
        if at < 0 or _end_in(text, content, 0) < 0:
            return f"turn {number} ({message['role']})"
    answers = [m for m in example.messages[example.num_given :] if m["role"] == "assistant"]
    for span, message in zip(rendered.answers[::-1], answers[::-1], strict=False):
        learnt = text[span.start : span.end]
        if _said(message["content"]) not in learnt:
            return "an answer that does not stand where it is learnt"
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in learnt:
                return f"the call of {call['function']['name']}"
    return ""


def reasoning_lost_in(example: Example, rendered: Rendered) -> str:
    """The first turn whose reasoning the text does not hold; empty where none is lost."""
    for number, message in enumerate(example.messages, start=1):
        content, reasoning = message["content"].strip(), message.get("reasoning_content", "").strip()
        inside = "</think>" in content and content not in rendered.text
        if inside or (reasoning and reasoning not in rendered.text):
            return f"the reasoning of turn {number}"
    return ""


def render(
    example: Example, tokenizer: Any, style: Style | None = None, *, mask: str = "completion"
) -> Rendered:
    """Text and answer spans of an example.

    Raises UserError for a chat that the template refuses, and where earlier turns change when later ones
    come, so that no span is certain: never a wrong mask.
    """
    if not example.messages:
        text = example.prompt + example.completion
        return Rendered(text, (Span(len(example.prompt), len(text), example.weight),), example.where)
    if style is not None and style.marked is not None:
        made = by_markers(example, tokenizer, style.marked)
    else:
        made = by_prefixes(example, tokenizer, last_only=mask == "last-turn")
    lost, reasoning = lost_in(example, made), reasoning_lost_in(example, made)
    return replace(made, lost=lost, lost_reasoning=reasoning) if lost or reasoning else made


def render_prompt(example: Example, tokenizer: Any) -> tuple[str, str]:
    """(prompt, reference answer) of an example's last turn, for generation."""
    if not example.messages:
        return example.prompt, example.completion
    tools = list(example.tools) or None
    prompt = apply(tokenizer, example.messages[:-1], tools, ask=True, where=example.where)
    return prompt, example.messages[-1]["content"]


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts a start token before plain text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
