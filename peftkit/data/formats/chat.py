"""Chats: OpenAI's `messages`, ShareGPT's `conversations`, turns as prompt and completion, preferences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peftkit.data.formats.base import BadRow, Example, Format, Message, string, weight_of
from peftkit.data.read import Row

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_PASSED_ON = ("name", "tool_call_id", "weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def _content(value: Any) -> str:
    """Text, or a list of parts that are all text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        kinds = {str(part.get("type")) for part in value} - {"text"}
        if kinds:
            raise BadRow(f"a turn with {', '.join(sorted(kinds))}", "text alone")
        return "".join(str(part.get("text") or "") for part in value)
    raise BadRow(f"a turn whose content is {type(value).__name__}", "text")


def _arguments(call: Any) -> Mapping[str, Any]:
    """A call as templates want it: arguments as a mapping, where OpenAI's format has JSON text."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise BadRow("a tool call without a name", "name and arguments in tool_calls")
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise BadRow("a tool call whose arguments are not JSON", "a JSON object") from None
    if not isinstance(arguments, Mapping):
        raise BadRow(f"a tool call whose arguments are {type(arguments).__name__}", "a JSON object")
    made = {"type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _turn(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"a turn that is {type(turn).__name__}", "turns with role and content")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow(f"the role {role!r}", f"one of {', '.join(sorted(_ROLES))}", check="roles")
    value = turn.get("content", turn.get("value"))
    made: dict[str, Any] = {"role": _ROLES[role]}
    if role == "function_call":
        calls = json_of(value, "a function_call")
        made["content"] = ""
        made["tool_calls"] = [_arguments(call) for call in (calls if isinstance(calls, list) else [calls])]
        if turn.get("weight") is not None:
            made["weight"] = weight_of(turn)
        return made
    calls = turn.get("tool_calls")
    made["content"] = "" if value is None and calls else _content(value)
    if len(turn) == 2:  # the usual turn, at once
        return made
    if calls:
        if not isinstance(calls, list):
            raise BadRow(f"tool_calls that are {type(calls).__name__}", "a list of calls")
        made["tool_calls"] = [_arguments(call) for call in calls]
    made.update({name: turn[name] for name in _PASSED_ON if turn.get(name) is not None})
    if "weight" in made:
        made["weight"] = weight_of(made)
    for name in _REASONING:
        if isinstance(turn.get(name), str) and turn[name]:
            made["reasoning_content"] = turn[name]
    return made


def json_of(value: Any, what: str) -> Any:
    """A value that may be given as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise BadRow(f"{what} that is not JSON", "JSON") from None


def listed(value: Any, what: str) -> Any:
    """A list that may be given as JSON text: CSV has no lists."""
    return json_of(value, what) if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def turns_of(turns: Any, name: str) -> tuple[Message, ...]:
    """A list of turns. Raises BadRow for one that is none, or whose turns are none."""
    turns = listed(turns, name)
    if not isinstance(turns, list) or not turns:
        got = f"{name} is {'empty' if turns == [] else type(turns).__name__}"
        raise BadRow(got, f"a list of turns in {name}")
    return tuple(_turn(turn) for turn in turns)


def _checked(found: tuple[Message, ...]) -> tuple[Message, ...]:
    """Turns that end in an answer. Raises BadRow for a chat that has nothing to learn at its end."""
    if found[0]["role"] == "assistant":
        raise BadRow("a chat that begins with assistant", "a user or system turn first", check="roles")
    if found[-1]["role"] != "assistant":
        got = f"a chat that ends with {found[-1]['role']}"
        raise BadRow(got, "an assistant turn to learn at the end", check="roles")
    if not found[-1]["content"].strip() and not found[-1].get("tool_calls"):
        raise BadRow("an empty answer", "text in the last assistant turn", check="empty-answers")
    return found


def _tools(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = json_of(values.get("tools") or [], "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools that are no list of mappings", "JSON Schemas of functions in tools")
    return tuple(tools)


def _system(values: Mapping[str, Any], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """ShareGPT keeps the system prompt in a column of its own."""
    system = values.get("system")
    if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
        return ({"role": "system", "content": system}, *turns)
    return turns


def _chat(row: Row) -> Example:
    values = row.fields
    name = "messages" if "messages" in values else "conversations"
    turns = _system(values, _checked(turns_of(values.get(name), name)))
    tools = _tools(values) if values.get("tools") else ()
    return Example(row.where, messages=turns, tools=tools, weight=weight_of(values))


def _prompt_completion(row: Row) -> Example:
    values = row.fields
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _checked(turns_of([*prompt, *completion], "prompt and completion"))
        tools = _tools(values) if values.get("tools") else ()
        return Example(
            row.where, messages=turns, num_given=len(prompt), tools=tools, weight=weight_of(values)
        )
    asked, answered = string(values, "prompt"), string(values, "completion", answer=True)
    return Example(row.where, prompt=asked, completion=answered, weight=weight_of(values))


def _preference(row: Row) -> Example:
    """A chosen and a rejected answer, as text or turns; the prompt may be told apart or stand in both."""
    values = row.fields
    chosen, rejected, prompt = values.get("chosen"), values.get("rejected"), values.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        given = turns_of(prompt, "prompt") if isinstance(prompt, list) else ()
        if isinstance(prompt, str) and prompt.strip():
            given = ({"role": "user", "content": prompt},)
        first = turns_of(chosen, "chosen")
        given = () if first[: len(given)] == given else given
        turns = _checked((*given, *first))
        return Example(row.where, messages=turns, rejected=turns_of(rejected, "rejected"))
    asked = prompt if isinstance(prompt, str) else ""
    answered = string(values, "chosen", answer=True)
    return Example(row.where, prompt=asked, completion=answered, rejected=string(values, "rejected"))


FORMATS = {
    "preference": Format((("chosen", "rejected"),), _preference),
    "chat": Format((("messages",), ("conversations",)), _chat),
    "prompt-completion": Format((("prompt", "completion"),), _prompt_completion),
}
