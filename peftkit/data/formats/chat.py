"""Chat formats: OpenAI's `messages`, ShareGPT's `conversations`, prompt and completion, preferences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftkit.data.formats.base import READERS, BadRow, Example, Message, as_boolean, loss_weight, reads, required_text
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
    "ai": "assistant",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "function_response": "tool",
    "tool_response": "tool",
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from", "speaker", "author"), ("content", "value", "text", "message")
_COPIED_KEYS = ("name", "tool_call_id")
_REASONING = ("reasoning_content", "reasoning", "thinking")
# whether a turn is in the loss: Axolotl's (message_field_training, a weight of 0 or 1), ms-swift's, verl's
_MASK_KEYS = ("train", "training", "loss", "loss_mask", "weight")
TURN_COLUMNS = ("messages", "conversations")
TURN_KEYS = frozenset((*_ROLE_KEYS, *_CONTENT_KEYS, "tool_calls", *_COPIED_KEYS, *_REASONING, *_MASK_KEYS))


def _content_text(value: object) -> str:
    """Return the text of a turn's content: text, or a list of parts that are all text. Raises BadRow."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        kinds = {str(part.get("type")) for part in value} - {"text"}
        if kinds:
            raise BadRow(f"a turn with {', '.join(sorted(kinds))}", "text only")
        return "".join(str(part.get("text") or "") for part in value)
    raise BadRow(f"a turn whose content is {type(value).__name__}", "text")


def _parse_tool_call(call: Any) -> Mapping[str, Any]:
    """Return a tool call with its arguments as a mapping, which most templates take, beside OpenAI's JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call without a name", "name and arguments in tool_calls")
    given = function.get("arguments", function.get("parameters"))
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given or "{}")
        except (ValueError, RecursionError):
            raise BadRow("a tool call whose arguments are not JSON", "a JSON object") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise BadRow(f"a tool call whose arguments are {type(arguments).__name__}", "a JSON object")
    parsed = {"name": function["name"], "arguments": dict(arguments)}
    if isinstance(given, str):  # some templates take the text, as it was written
        parsed["arguments_text"] = given
    tool_call = {"type": "function", "function": parsed}
    return {"id": call["id"], **tool_call} if isinstance(call.get("id"), str) else tool_call


def _turn_weight(turn: Mapping[str, Any], role: str) -> float | None:
    """Return a turn's weight in the loss by the masks of the tools that have them; None where it has none.

    Raises BadRow for a mask of parts of a turn, for one that trains another's turn, and for a key that nobody
    knows and that is off: it may be a mask.
    """
    weight = None
    for key, value in turn.items():
        if key in _MASK_KEYS and value is not None and value != "":
            part = float(value) if isinstance(value, bool) else loss_weight({"weight": value})
            weight = part if weight is None else weight * part  # off by one of them is off
            if part and role != "assistant" and key != "weight":
                raise BadRow(f"{key}: {value!r} on a {role} turn", "assistant turns alone in the loss")
        elif key == "train_detail" and value:
            raise BadRow("train_detail, a mask of parts of a turn", "a mask of whole turns, such as train: false")
        elif key not in TURN_KEYS and (value is False or (value == 0 and isinstance(value, int | float))):
            got = f"a turn with {key}: {value!r}, which may be a mask"
            raise BadRow(got, f"a known mask ({', '.join(_MASK_KEYS)}), or a turn without that key")
    return weight


def _parse_turn(turn: object) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"a turn that is {type(turn).__name__}", "turns with role and content")
    role = next((turn[key] for key in _ROLE_KEYS if key in turn), None)
    role = role.lower() if isinstance(role, str) else role
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow(f"the role {role!r}", f"one of {', '.join(sorted(_ROLES))}", check="roles")
    value = _said_once(turn, _CONTENT_KEYS)
    message: dict[str, Any] = {"role": _ROLES[role]}
    if role == "function_call":
        calls = parse_json(value, "a function_call")
        message["content"] = ""
        message["tool_calls"] = [_parse_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
        if (weight := _turn_weight(turn, "assistant")) is not None:
            message["weight"] = weight
        return message
    calls = turn.get("tool_calls")
    message["content"] = "" if value is None and calls else _content_text(value)
    if len(turn) == 2 and not calls:  # the usual turn, at once
        return message
    if calls:
        if not isinstance(calls, list):
            raise BadRow(f"tool_calls that are {type(calls).__name__}", "a list of calls")
        message["tool_calls"] = [_parse_tool_call(call) for call in calls]
    message.update({name: turn[name] for name in _COPIED_KEYS if turn.get(name) is not None})
    if (weight := _turn_weight(turn, message["role"])) is not None:
        message["weight"] = weight
    if reasoning := _said_once(turn, _REASONING):
        if not isinstance(reasoning, str):
            raise BadRow(f"reasoning that is {type(reasoning).__name__}", "text")
        message["reasoning_content"] = reasoning
    return message


def _said_once(turn: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the value of the first of these keys that has one. Raises BadRow where two say different things."""
    given = [name for name in names if name in turn]
    filled = [name for name in given if turn[name] not in (None, "", [], {})]
    if any(turn[name] != turn[filled[0]] for name in filled[1:]):
        raise BadRow(f"a turn with {' and '.join(filled)}, which differ", f"one of {', '.join(filled)}")
    return turn[(filled or given)[0]] if given else None


def parse_json(value: object, what: str) -> Any:
    """Return a value, parsed if it is given as JSON text. Raises BadRow."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} that is not JSON", "JSON") from None


def parse_list(value: object, what: str) -> Any:
    """Return a list, parsed if it is given as JSON text: CSV has no lists. Raises BadRow."""
    return parse_json(value, what) if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def parse_turns(turns: object, name: str) -> tuple[Message, ...]:
    """Parse a list of turns. Raises BadRow if it is not a list of turns."""
    turns = parse_list(turns, name)
    if not isinstance(turns, list) or not turns:
        got = f"{name} is {'empty' if turns == [] else type(turns).__name__}"
        raise BadRow(got, f"a list of turns in {name}")
    return tuple(_parse_turn(turn) for turn in turns)


def repair_turns(turns: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Return turns in an order that templates take, and what was repaired.

    Neighbours of one role are joined by a blank line; an assistant turn at the start is context, not trained.
    """
    repaired: list[Message] = []
    repairs: dict[str, None] = {}
    for turn in turns:
        last = repaired[-1] if repaired else {}
        if last.keys() == turn.keys() == {"role", "content"} and last["role"] == turn["role"] in {"user", "assistant"}:
            said = (last["content"], turn["content"])
            repaired[-1] = {**turn, "content": "\n\n".join(text for text in said if text.strip())}
            repairs[f"neighbouring {turn['role']} turns were joined"] = None
        else:
            repaired.append(turn)
    start = next((number for number, turn in enumerate(repaired) if turn["role"] != "system"), 0)
    if repaired[start]["role"] == "assistant" and "weight" not in repaired[start] and len(repaired) > start + 1:
        repaired[start] = {**repaired[start], "weight": 0.0}
        repairs["the assistant turn at the start is context"] = None
    return tuple(repaired), tuple(repairs)


def _check_turns(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return turns that end in an answer. Raises BadRow for a chat without an assistant turn at its end."""
    if all(turn["role"] == "assistant" for turn in turns):
        raise BadRow("a chat of assistant turns alone", "a user or system turn first", check="roles")
    if turns[-1]["role"] != "assistant":
        got = f"a chat that ends with {turns[-1]['role']}"
        raise BadRow(got, "an assistant turn at the end", check="roles")
    if not turns[-1]["content"].strip() and not turns[-1].get("tool_calls"):
        raise BadRow("an empty answer", "text in the last assistant turn", check="empty-answers")
    return turns


def _parse_tools(values: Mapping[str, object]) -> tuple[Mapping[str, Any], ...]:
    tools = parse_json(values.get("tools") or [], "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools that are not a list of mappings", "JSON Schemas of functions in tools")
    return tuple(tools)


@reads("chat", ("messages",), ("conversations",), optional=("system", "tools", "weight"))
def _chat(row: Row) -> Example:
    values = row.fields
    name = "messages" if "messages" in values else "conversations"
    turns, repairs = repair_turns(_check_turns(parse_turns(values.get(name), name)))
    system = values.get("system")  # ShareGPT keeps the system prompt in a column of its own
    if isinstance(system, str) and system.strip():
        if turns[0]["role"] == "system" and turns[0]["content"].strip() != system.strip():
            raise BadRow("a system column beside a system turn", "one system prompt", check="roles")
        turns = turns if turns[0]["role"] == "system" else ({"role": "system", "content": system}, *turns)
    tools = _parse_tools(values) if values.get("tools") else ()
    return Example(row.where, messages=turns, tools=tools, weight=loss_weight(values), repairs=repairs)


@reads("prompt-completion", ("prompt", "completion"), optional=("tools", "weight"))
def _prompt_completion(row: Row) -> Example:
    values = row.fields
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _check_turns(parse_turns([*prompt, *completion], "prompt and completion"))
        tools = _parse_tools(values) if values.get("tools") else ()
        return Example(row.where, messages=turns, num_given=len(prompt), tools=tools, weight=loss_weight(values))
    if values.get("tools"):
        raise BadRow("tools beside a text prompt", "turns in prompt and completion, in which a template writes tools")
    prompt_text, completion_text = required_text(values, "prompt"), required_text(values, "completion", answer=True)
    return Example(row.where, prompt=prompt_text, completion=completion_text, weight=loss_weight(values))


@reads("preference", ("chosen", "rejected"), optional=("prompt",))
def _preference(row: Row) -> Example:
    """Read a chosen and a rejected answer, as text or turns; the prompt has its own column or starts both."""
    values = row.fields
    chosen, rejected, prompt = values.get("chosen"), values.get("rejected"), values.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt_turns = parse_turns(prompt, "prompt") if isinstance(prompt, list) else ()
        if isinstance(prompt, str) and prompt.strip():
            prompt_turns = ({"role": "user", "content": prompt},)
        chosen_turns = parse_turns(chosen, "chosen")
        prompt_turns = () if chosen_turns[: len(prompt_turns)] == prompt_turns else prompt_turns
        turns = _check_turns((*prompt_turns, *chosen_turns))
        return Example(row.where, messages=turns, rejected=parse_turns(rejected, "rejected"))
    prompt_text = prompt if isinstance(prompt, str) else ""
    chosen_text = required_text(values, "chosen", answer=True)
    return Example(row.where, prompt=prompt_text, completion=chosen_text, rejected=required_text(values, "rejected"))


@reads(
    "unpaired-preference",
    *(("prompt", "completion", "label"), ("messages", "label"), ("conversations", "label")),
    *(("messages", "kto_tag"), ("conversations", "kto_tag"), ("instruction", "output", "kto_tag")),
    optional=("system", "tools", "input", "history"),
)
def _unpaired_preference(row: Row) -> Example:
    """Read an answer with whether it is a good one, as for KTO: by TRL, ms-swift and LLaMA-Factory."""
    values = row.fields
    name = "kto_tag" if "kto_tag" in values else "label"
    if as_boolean(values.get(name)) is None:
        raise BadRow(f"{name} is {values.get(name)!r}", f"true or false in {name}")
    read_row = _prompt_completion if "completion" in values else _chat if "instruction" not in values else None
    example = READERS["instruction"].read(row) if read_row is None else read_row(row)
    return replace(example, label=str(as_boolean(values[name])).lower())
