"""Rendering of examples as text with the character spans of answers, alike in training and generation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from peftkit.data.formats import Example, Message
from peftkit.data.jinja.render import ChatRequest, render_chat, render_chats
from peftkit.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """An example as text, and the spans of its answers, first to last.

    `missing` names what of the example the text lacks, `missing_reasoning` whose reasoning.
    """

    text: str
    answers: tuple[Span, ...]
    where: str
    missing: str = ""
    missing_reasoning: str = ""
    weight: float = 1.0  # of the row


@dataclass(frozen=True)
class Style:
    """How chats are rendered. `marked` is a template whose generation markers give the spans.

    Without one, spans come from rendering prefixes: what the template adds for an answer beyond the
    generation prompt. `reason` says why. `within` is True where marked spans begin before the generation
    prompt ends.
    """

    source: str  # "the model's own" | "the default" | a file
    marked: str | None
    reason: str
    within: bool = False


NO_CHATS = Style("none", None, "no chats in the data")


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the default one. Returns whether it was needed."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return True


def select_template(tokenizer: PreTrainedTokenizerBase, tools: object = None) -> str:
    """Return the template that chats are rendered with; of several, the one that transformers selects."""
    templates = tokenizer.chat_template
    if not isinstance(templates, Mapping):
        return str(templates)
    name = "tool_use" if tools and "tool_use" in templates else "default"
    return str(templates.get(name, templates))


def uses_main_template(example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True where a chat is rendered with the main template: some models have another one for tools."""
    return not example.tools or select_template(tokenizer, example.tools) == select_template(tokenizer)


def _text_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _renders_probe(template: str, *turns: Message, probe: str = _PROBE) -> bool:
    """Return True where a template accepts turns and writes the probe that one of them holds."""
    import jinja2

    try:
        text, _ = render_chat(turns, template=template, bos_token="", eos_token="")
    except (jinja2.TemplateError, TypeError):
        return False
    return probe in text


@lru_cache(maxsize=32)
def needs_content_parts(template: str) -> bool:
    """Return True where contents must be lists of parts, as for vision models: plain text is left out."""
    text, parts = ({"role": "user", "content": content} for content in (_PROBE, _text_parts(_PROBE)))
    return not _renders_probe(template, text) and _renders_probe(template, parts)


@lru_cache(maxsize=32)
def supports_system_turn(template: str) -> bool:
    """Return True where a template renders a system turn: some refuse it, some leave it out."""
    system, user = (_text_parts(text) if needs_content_parts(template) else text for text in (_PROBE, "hi"))
    return _renders_probe(template, {"role": "system", "content": system}, {"role": "user", "content": user})


@lru_cache(maxsize=32)
def tool_call_form(template: str) -> tuple[bool, bool]:
    """Return (whether a template takes a call's arguments as JSON text, whether its turn has null for content).

    It is tried: the first form counts whose arguments stand in the text.
    """
    for as_text, is_null in ((False, False), (False, True), (True, False), (True, True)):
        arguments = {"x": _PROBE}
        call = {"function": {"name": "probe", "arguments": arguments}, "type": "function", "id": "probe0001"}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        turns: tuple[Message, ...] = (
            {"role": "user", "content": "hi"},
            _with_call_form(turn, as_text=as_text, is_null=is_null),
        )
        if needs_content_parts(template):
            turns = tuple({**one, "content": _text_parts(str(one["content"] or ""))} for one in turns)
        # a mapping that stands there as Python has it was meant to be text
        is_repr = not as_text and _renders_probe(template, *turns, probe=f"'x': '{_PROBE}'")
        if _renders_probe(template, *turns) and not is_repr:
            return as_text, is_null
    return False, False


def _with_call_form(turn: Message, *, as_text: bool, is_null: bool) -> Message:
    """Return a turn whose calls are in the form that a template takes."""
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = dict(call["function"])
        text = function.pop("arguments_text", None)
        if as_text:
            function["arguments"] = text or json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function})
    content = None if is_null and not turn["content"] else turn["content"]
    return {**turn, "content": content, "tool_calls": calls}


def _turns(messages: Sequence[Message], template: str) -> list[Message]:
    """The turns as the template takes them: a system prompt goes into the first user turn where it must."""
    turns = list(messages)
    if any(turn.get("tool_calls") for turn in turns):
        as_text, is_null = tool_call_form(template)
        turns = [_with_call_form(turn, as_text=as_text, is_null=is_null) for turn in turns]
    if turns and turns[0]["role"] == "system" and not supports_system_turn(template):
        system = turns.pop(0)["content"]
        if turns and turns[0]["role"] == "user":
            turns[0] = {**turns[0], "content": f"{system}\n\n{turns[0]['content']}"}
    if needs_content_parts(template):
        return [{**turn, "content": _text_parts(turn["content"] or "")} for turn in turns]
    return turns


def _render(
    template: str, requests: Sequence[tuple[Sequence[Message], Mapping[str, Any]]], tools: Any, where: str
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Render (messages, options) of one example. Returns (text, marked spans) for each.

    `options` are transformers' and the special tokens. A system prompt goes into the first user turn where
    the template does not support one. Raises UserError for a chat that the template refuses.
    """
    import jinja2

    tool_list = list(tools or ()) or None
    chats = [ChatRequest(_turns(messages, template), tool_list, options) for messages, options in requests]
    try:
        return render_chats(template, chats)
    except (jinja2.TemplateError, TypeError) as error:
        got = f"a chat that the model's template refuses ({error})"
        raise UserError(Problem(where, got, "turns in an order that the template accepts")) from None


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: object,
    *,
    add_generation_prompt: bool,
    where: str,
) -> str:
    """Render a chat with the model's own template, with or without the generation prompt, as text."""
    options = {"add_generation_prompt": add_generation_prompt, **tokenizer.special_tokens_map}
    return _render(select_template(tokenizer, tools), [(messages, options)], tools, where)[0][0]


def _answer_weights(example: Example) -> list[float]:
    """Return the weights of the answers in the loss, first to last."""
    return [
        float(message.get("weight", 1.0)) * example.weight
        for message in example.messages[example.num_given :]
        if message["role"] == "assistant"
    ]


def _answer_turns(example: Example) -> list[int]:
    """Return the numbers of the turns in the loss."""
    turns = enumerate(example.messages)
    return [number for number, message in turns if message["role"] == "assistant" and number >= example.num_given]


def _skip_prompt(text: str, start: int, prompt: str, tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """Return where the answer of a span that starts at `start` begins: not before its generation prompt ends.

    A prompt may end in what the text lacks, such as an open reasoning block. Then only those of its added
    tokens count that the text has. Raises UserError where the template rewrites earlier turns.
    """
    if not prompt.startswith(text[:start]):
        raise _rewrites_error(where)
    prompt_tail = prompt[start:]
    if text.startswith(prompt_tail, start):
        return start + len(prompt_tail)
    added_tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for a, b in tokenizer(prompt_tail, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]:
        if prompt_tail[a:b] not in added_tokens or not text.startswith(prompt_tail[a:b], start):
            break
        start += b - a
    return start


def render_by_markers(example: Example, tokenizer: PreTrainedTokenizerBase, template: str, *, within: bool) -> Rendered:
    """Render an example with spans from generation markers; with `within`, less the prompt's part.

    Raises UserError where the markers do not give each answer once.
    """
    special_tokens, answer_turns = tokenizer.special_tokens_map, _answer_turns(example)
    requests = [(example.messages, {"return_assistant_tokens_mask": True, **special_tokens})]
    if within:
        options = {"add_generation_prompt": True, **special_tokens}
        requests += [(example.messages[:turn_number], options) for turn_number in answer_turns]
    (text, spans), *prompts = _render(template, requests, example.tools, example.where)
    num_answers = sum(message["role"] == "assistant" for message in example.messages)
    if len(spans) > num_answers:
        # join spans that touch: some templates mark the last end token by itself
        merged: list[tuple[int, int]] = []
        for start, end in spans:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        spans = merged
    if len(spans) != num_answers:
        got = f"{len(spans)} marked answers of {num_answers}"
        raise UserError(Problem(example.where, got, "a template that marks every answer once"))
    spans = spans[num_answers - len(answer_turns) :]
    starts = [start for start, _ in spans]
    if within:
        pairs = zip(starts, prompts, strict=True)
        starts = [_skip_prompt(text, start, prompt, tokenizer, example.where) for start, (prompt, _) in pairs]
    ends, weights = [end for _, end in spans], _answer_weights(example)
    answers = tuple(Span(*values) for values in zip(starts, ends, weights, strict=True))
    return Rendered(text, answers, example.where)


def _rewrites_error(where: str) -> UserError:
    """Return the UserError for a template that rewrites earlier turns."""
    got, fix = "a chat template that rewrites earlier turns", "use data.mask: last-turn, or another template"
    return UserError(Problem(where, got, "a template whose prompt is a prefix of the whole chat", fix))


def render_by_prefixes(example: Example, tokenizer: PreTrainedTokenizerBase, *, last_only: bool) -> Rendered:
    """Render an example with spans from prefixes: the chat up to each answer, and with it.

    The former is rendered with the generation prompt. Raises UserError where the template rewrites earlier
    turns.
    """
    chat, plain = example.messages, {"add_generation_prompt": False, **tokenizer.special_tokens_map}
    pairs = list(zip(_answer_turns(example), _answer_weights(example), strict=True))
    pairs = pairs[-1:] if last_only else pairs
    requests = [(chat, plain)]
    for turn_number, _ in pairs:
        is_last = turn_number + 1 == len(chat)
        requests.append((chat[:turn_number], {**plain, "add_generation_prompt": True}))
        requests += [] if is_last else [(chat[: turn_number + 1], plain)]
    text, *parts = [
        text for text, _ in _render(select_template(tokenizer, example.tools), requests, example.tools, example.where)
    ]
    answers = []
    for turn_number, weight in pairs:
        prompt_text = parts.pop(0)
        turn_text = text if turn_number + 1 == len(chat) else parts.pop(0)
        if not text.startswith(turn_text) and tokenizer.eos_token:  # some write it once, after the last turn
            turn_text = turn_text.removesuffix(tokenizer.eos_token)
        if not (turn_text.startswith(prompt_text) and text.startswith(turn_text)):
            raise _rewrites_error(example.where)
        answers.append(Span(len(prompt_text), len(turn_text), weight))
    return Rendered(text, tuple(answers), example.where)


def _strip_reasoning(content: str) -> str:
    """Return an answer without its reasoning, which some templates leave out."""
    return content.rsplit("</think>", 1)[-1].strip()


def _find_end(text: str, content: str, start: int) -> int:
    """Return where a content at `start` or later ends, as it is or as JSON; -1 where it is missing."""
    position = text.find(content, start)
    if position >= 0:
        return position + len(content)
    for form in (_strip_reasoning, lambda said: json.dumps(said, ensure_ascii=False)[1:-1]):
        position = text.find(form(content), start)
        if position >= 0:
            return position + len(form(content))
    return -1


def missing_content(example: Example, rendered: Rendered) -> str:
    """Return the first turn, call or tool that the text of a chat lacks; empty where all is there.

    Turns of others than the assistant must stand outside the answers, in their order: a tool's "24" is in the
    answer as well.
    """
    edges = [0, *(edge for span in rendered.answers for edge in (span.start, span.end)), len(rendered.text)]
    outside = "".join(rendered.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
    text, text_outside, position = rendered.text, outside, 0
    for number, message in enumerate(example.messages, start=1):
        content = message["content"].strip()
        if message["role"] in {"user", "tool"}:
            position = _find_end(text_outside, content, position)
        if position < 0 or _find_end(text, content, 0) < 0:
            return f"turn {number} ({message['role']})"
    for span, turn_number in zip(rendered.answers[::-1], _answer_turns(example)[::-1], strict=False):
        for call in example.messages[turn_number].get("tool_calls", ()):
            if call["function"]["name"] not in text[span.start : span.end]:
                return f"the call to {call['function']['name']}"
    for tool in example.tools:
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str) and name not in text:
            return f"the tool {name}"
    return ""


def missing_reasoning(example: Example, rendered: Rendered) -> str:
    """Return the first turn whose reasoning the text lacks; empty where none is missing."""
    for number, message in enumerate(example.messages, start=1):
        if "</think>" not in message["content"] and "reasoning_content" not in message:
            continue
        think_text, _, _ = message["content"].rpartition("</think>")
        for reasoning in (think_text.strip().removeprefix("<think>"), message.get("reasoning_content", "")):
            if reasoning.strip() not in rendered.text:
                return f"the reasoning of turn {number}"
    return ""


def has_misplaced_answer(example: Example, rendered: Rendered) -> bool:
    """Return True where an answer is in the text, but outside its span."""
    text = rendered.text
    for span, turn_number in zip(rendered.answers[::-1], _answer_turns(example)[::-1], strict=False):
        answer = _strip_reasoning(example.messages[turn_number]["content"])
        if text.find(answer, span.start, span.end) < 0 and answer in text:
            return True
    return False


def render(
    example: Example, tokenizer: PreTrainedTokenizerBase, style: Style | None = None, *, mask: str = "completion"
) -> Rendered:
    """Render an example as text with its answer spans.

    Raises UserError for a chat that the template refuses, and where earlier turns change when later ones
    come, so that no span is certain: never a wrong mask.
    """
    if not example.messages:
        text = example.prompt + example.completion
        return Rendered(text, (Span(len(example.prompt), len(text), example.weight),), example.where)
    if style is not None and style.marked is not None and uses_main_template(example, tokenizer):
        rendered = render_by_markers(example, tokenizer, style.marked, within=style.within)
    else:
        rendered = render_by_prefixes(example, tokenizer, last_only=mask == "last-turn")
    if len(example.messages) != 2 or len(rendered.answers) != 1 or example.tools or example.weight != 1.0:
        is_complete_pair = False
    else:
        question, answer = example.messages
        if len(question) != 2 or len(answer) != 2 or "</think>" in answer["content"]:
            is_complete_pair = False
        else:
            start, end = rendered.answers[0].start, rendered.answers[0].end
            has_question = rendered.text.find(question["content"].strip(), 0, start) >= 0
            is_complete_pair = has_question and rendered.text.find(answer["content"].strip(), start, end) >= 0
    if is_complete_pair:
        return rendered
    if has_misplaced_answer(example, rendered):
        # nothing is learnt of such a row: a wrong mask would be worse
        return replace(rendered, answers=(), missing="an answer that is not where the template puts answers")
    missing, reasoning = missing_content(example, rendered), missing_reasoning(example, rendered)
    if not (missing or reasoning) and example.weight == 1.0:
        return rendered
    return replace(rendered, missing=missing, missing_reasoning=reasoning, weight=example.weight)


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Render the prompt of an example's last turn for generation. Returns (prompt, reference answer)."""
    if not example.messages:
        return example.prompt, example.completion
    prompt = apply_template(
        tokenizer, example.messages[:-1], example.tools, add_generation_prompt=True, where=example.where
    )
    return prompt, example.messages[-1]["content"]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True where a tokenizer puts a bos token before plain text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def text_after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template writes after an answer; empty where it refuses a chat of two turns."""
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": _PROBE})
    try:
        text = apply_template(tokenizer, turns, None, add_generation_prompt=False, where="")
    except UserError:
        return ""
    return text.rpartition(_PROBE)[2] if _PROBE in text else ""
