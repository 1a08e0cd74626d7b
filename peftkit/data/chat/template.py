"""Examples as text, with the spans that answers cover. Training and generation render the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from peftkit.data.chat.render import render_chat
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
    weight: float = 1.0  # of the row


@dataclass(frozen=True)
class Style:
    """How chats become text. `marked` is a template whose generation markers give the spans.

    Without one, spans come from rendering prefixes: what the template adds for an answer beyond the prompt
    for it. `reason` says why. `within` says that marked spans begin before the prompt for the answer ends.
    """

    source: str  # "the model's own" | "the default" | a file
    marked: str | None
    reason: str
    within: bool = False


NO_CHATS = Style("none", None, "no chats in the data")


def ensure_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the default one. Returns whether it was needed."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return True


def template_of(tokenizer: Any, tools: Any = None) -> str:
    """The template that chats are rendered with; of several, the one that transformers takes."""
    found = tokenizer.chat_template
    if not isinstance(found, Mapping):
        return str(found)
    name = "tool_use" if tools and "tool_use" in found else "default"
    return str(found.get(name, found))


def takes_default(example: Example, tokenizer: Any) -> bool:
    """Whether a chat is rendered with the default template: some bring another one for chats with tools."""
    return not example.tools or template_of(tokenizer, example.tools) == template_of(tokenizer)


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _writes(template: str, *turns: Message) -> bool:
    """Whether a template takes turns and writes the probe that one of them holds."""
    import jinja2

    try:
        text, _ = render_chat(turns, template=template, bos_token="", eos_token="")
    except (jinja2.TemplateError, TypeError):
        return False
    return _PROBE in text


@lru_cache(maxsize=32)
def takes_parts(template: str) -> bool:
    """Whether contents must be lists of parts, as for models that see: plain text is left out."""
    text, parts = ({"role": "user", "content": content} for content in (_PROBE, _parts(_PROBE)))
    return not _writes(template, text) and _writes(template, parts)


@lru_cache(maxsize=32)
def takes_system(template: str) -> bool:
    """Whether a template renders a system turn: some refuse it, some leave it out."""
    system, user = (_parts(text) if takes_parts(template) else text for text in (_PROBE, "hi"))
    return _writes(template, {"role": "system", "content": system}, {"role": "user", "content": user})


def _turns(messages: Sequence[Message], template: str) -> list[Message]:
    """The turns as the template takes them: a system prompt goes into the first user turn where it must."""
    turns = list(messages)
    if turns and turns[0]["role"] == "system" and not takes_system(template):
        system = turns.pop(0)["content"]
        if turns and turns[0]["role"] == "user":
            turns[0] = {**turns[0], "content": f"{system}\n\n{turns[0]['content']}"}
    if takes_parts(template):
        return [{**turn, "content": _parts(turn["content"])} for turn in turns]
    return turns


def _refused(where: str, error: Exception) -> UserError:
    got = f"a chat that the model's template refuses ({error})"
    return UserError(Problem(where, got, "turns in the order that the template knows"))


def _rendered(
    template: str, messages: Sequence[Message], tools: Any, where: str, options: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """(text, marked spans) of a chat; `options` are transformers' and the special tokens."""
    import jinja2

    turns, given = _turns(messages, template), list(tools or ()) or None
    try:
        return render_chat(turns, template=template, tools=given, **options)
    except (jinja2.TemplateError, TypeError) as error:
        raise _refused(where, error) from None


def apply(
    tokenizer: Any, messages: Sequence[Message], tools: Any, *, ask: bool, where: str, specials: Any = None
) -> str:
    """The text of a chat by the model's own template, with the prompt for an answer where `ask`."""
    template = template_of(tokenizer, tools)
    options = {"add_generation_prompt": ask, **(specials or tokenizer.special_tokens_map)}
    return _rendered(template, messages, tools, where, options)[0]


def _weights(example: Example) -> list[float]:
    """The weights of the answers that are learnt, first to last."""
    return [
        float(message.get("weight", 1.0)) * example.weight
        for message in example.messages[example.num_given :]
        if message["role"] == "assistant"
    ]


def _answers(example: Example) -> list[int]:
    """The places of the turns that are learnt."""
    turns = enumerate(example.messages)
    return [i for i, m in turns if m["role"] == "assistant" and i >= example.num_given]


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans, those that touch as one: some templates mark the last end token by itself."""
    made: list[tuple[int, int]] = []
    for start, end in spans:
        if made and made[-1][1] == start:
            made[-1] = (made[-1][0], end)
        else:
            made.append((start, end))
    return made


def _past_prompt(text: str, start: int, prompt: str, tokenizer: Any, where: str) -> int:
    """Where an answer begins whose span starts at `start`: not before the prompt for it ends.

    A prompt may end in what the text lacks, such as an open reasoning block. Then those of its added tokens
    count that the text has.
    """
    if not prompt.startswith(text[:start]):
        raise _rewrites(where)
    head = prompt[start:]
    if text.startswith(head, start):
        return start + len(head)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for a, b in tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]:
        if head[a:b] not in added or not text.startswith(head[a:b], start):
            break
        start += b - a
    return start


def by_markers(example: Example, tokenizer: Any, template: str, *, within: bool) -> Rendered:
    """Text and spans by the template's generation markers; with `within`, less what the prompt gives."""
    tools, where = example.tools, example.where
    specials = tokenizer.special_tokens_map
    marking = {"return_assistant_tokens_mask": True, **specials}
    text, spans = _rendered(template, example.messages, tools, where, marking)
    num_answers = sum(m["role"] == "assistant" for m in example.messages)
    if len(spans) > num_answers:
        spans = _joined(spans)
    if len(spans) != num_answers:
        got = f"{len(spans)} marked answers of {num_answers}"
        raise UserError(Problem(where, got, "a template that marks every answer once"))
    places = _answers(example)
    answers = []
    for i, (start, end), weight in zip(
        places, spans[num_answers - len(places) :], _weights(example), strict=True
    ):
        first = start
        if within:
            before = example.messages[:i]
            asking = {"add_generation_prompt": True, **specials}
            prompt, _ = _rendered(template, before, tools, where, asking)
            first = _past_prompt(text, start, prompt, tokenizer, where)
        answers.append(Span(first, end, weight))
    return Rendered(text, tuple(answers), where)


def _rewrites(where: str) -> UserError:
    got, fix = "a chat template that rewrites earlier turns", "use data.mask: last-turn, or another template"
    return UserError(Problem(where, got, "a template whose prompt is a prefix of the whole chat", fix))


def by_prefixes(example: Example, tokenizer: Any, *, last_only: bool) -> Rendered:
    """Text and spans by rendering what comes before each answer with the prompt for it, and up to its end."""
    tools, where = example.tools, example.where
    specials = tokenizer.special_tokens_map
    text = apply(tokenizer, example.messages, tools, ask=False, where=where, specials=specials)
    pairs = list(zip(_answers(example), _weights(example), strict=True))
    answers = []
    for i, weight in pairs[-1:] if last_only else pairs:
        before = apply(tokenizer, example.messages[:i], tools, ask=True, where=where, specials=specials)
        is_last = i + 1 == len(example.messages)
        after = (
            text if is_last else apply(tokenizer, example.messages[: i + 1], tools, ask=False, where=where)
        )
        if not text.startswith(after) and tokenizer.eos_token:  # some write it once, after the last turn
            after = after.removesuffix(tokenizer.eos_token)
        if not (after.startswith(before) and text.startswith(after)):
            raise _rewrites(where)
        answers.append(Span(len(before), len(after), weight))
    return Rendered(text, tuple(answers), where)


def _said(content: str) -> str:
    """What of an answer every template keeps: some take the reasoning out."""
    return content.rsplit("</think>", 1)[-1].strip()


def _outside(rendered: Rendered) -> str:
    """The text without what is learnt of it: there stands what others said."""
    edges = [0, *(edge for span in rendered.answers for edge in (span.start, span.end)), len(rendered.text)]
    return "".join(rendered.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))


def _unnamed_tool(example: Example, text: str) -> str:
    """The first tool that the text does not name."""
    for tool in example.tools:
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str) and name not in text:
            return f"the tool {name}"
    return ""


def _end_in(text: str, content: str, start: int) -> int:
    """Where a content that stands at `start` or later ends, as it is or as JSON; -1 where it does not."""
    place = text.find(content, start)
    if place >= 0:
        return place + len(content)
    for form in (_said, lambda said: json.dumps(said, ensure_ascii=False)[1:-1]):
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
    for span, i in zip(rendered.answers[::-1], _answers(example)[::-1], strict=False):
        for call in example.messages[i].get("tool_calls", ()):
            if call["function"]["name"] not in text[span.start : span.end]:
                return f"the call of {call['function']['name']}"
    return _unnamed_tool(example, text)


def reasoning_lost_in(example: Example, rendered: Rendered) -> str:
    """The first turn whose reasoning the text does not hold; empty where none is lost."""
    for number, message in enumerate(example.messages, start=1):
        if "</think>" not in message["content"] and "reasoning_content" not in message:
            continue
        inside, _, _ = message["content"].rpartition("</think>")
        for reasoning in (inside.strip().removeprefix("<think>"), message.get("reasoning_content", "")):
            if reasoning.strip() not in rendered.text:
                return f"the reasoning of turn {number}"
    return ""


def misplaced(example: Example, rendered: Rendered) -> bool:
    """Whether an answer stands in the text, but not where it is learnt."""
    text = rendered.text
    for span, i in zip(rendered.answers[::-1], _answers(example)[::-1], strict=False):
        said = _said(example.messages[i]["content"])
        if text.find(said, span.start, span.end) < 0 and said in text:
            return True
    return False


def _is_plain(example: Example, made: Rendered) -> bool:
    """Whether a question and its answer stand where they belong: the usual row, seen at once."""
    if len(example.messages) != 2 or len(made.answers) != 1 or example.tools or example.weight != 1.0:
        return False
    asked, said = example.messages
    if len(asked) != 2 or len(said) != 2 or "</think>" in said["content"]:
        return False
    start, end = made.answers[0].start, made.answers[0].end
    at_home = made.text.find(asked["content"].strip(), 0, start) >= 0
    return at_home and made.text.find(said["content"].strip(), start, end) >= 0


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
    if style is not None and style.marked is not None and takes_default(example, tokenizer):
        made = by_markers(example, tokenizer, style.marked, within=style.within)
    else:
        made = by_prefixes(example, tokenizer, last_only=mask == "last-turn")
    if _is_plain(example, made):
        return made
    if misplaced(example, made):
        # nothing is learnt of such a row: a wrong mask would be worse
        return replace(made, answers=(), lost="an answer that does not stand where the template puts answers")
    lost, reasoning = lost_in(example, made), reasoning_lost_in(example, made)
    if not (lost or reasoning) and example.weight == 1.0:
        return made
    return replace(made, lost=lost, lost_reasoning=reasoning, weight=example.weight)


def render_prompt(example: Example, tokenizer: Any) -> tuple[str, str]:
    """(prompt, reference answer) of an example's last turn, for generation."""
    if not example.messages:
        return example.prompt, example.completion
    prompt = apply(tokenizer, example.messages[:-1], example.tools, ask=True, where=example.where)
    return prompt, example.messages[-1]["content"]


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts a start token before plain text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def turn_end(tokenizer: Any) -> str:
    """What the template writes after an answer; empty where it takes no chat of two turns."""
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": _PROBE})
    try:
        text = apply(tokenizer, turns, None, ask=False, where="")
    except UserError:
        return ""
    return text.rpartition(_PROBE)[2] if _PROBE in text else ""
