"""What every format of data is brought to: an `Example`. And what a row that does not fit raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from peftkit.data.read import Row
from peftkit.units import clipped

Message = Mapping[str, Any]
_MOST = 300  # characters that are told of a row


@dataclass(frozen=True)
class Example:
    """One training example: a chat (`messages`), a prompt with its completion, raw text, or classified text.

    A message has role and content, and may have reasoning_content, tool_calls and a weight. `tags` has one
    class per word of `words`. `rejected` is the answer that a preference turns down, as turns or text.
    """

    where: str
    messages: tuple[Message, ...] = ()
    num_given: int = 0  # leading turns that are prompt, whoever speaks
    prompt: str = ""
    completion: str = ""
    label: str = ""
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON Schemas of functions that the assistant may call
    rejected: tuple[Message, ...] | str = ()
    weight: float = 1.0  # of this row in the loss

    @property
    def key(self) -> str:
        """What makes two examples the same for splitting: their input."""
        if self.words:
            return " ".join(self.words)
        if self.messages:
            asked = "\n".join(m["content"] for m in self.messages if m["role"] in {"user", "tool"})
            return asked or self.messages[0]["content"]
        return self.prompt or self.completion

    @property
    def answer(self) -> str:
        """What is to be learnt, as text."""
        if self.messages:
            return "\n".join(
                m["content"] for m in self.messages[self.num_given :] if m["role"] == "assistant"
            )
        return self.completion or self.label or " ".join(self.tags)

    def to_json(self) -> dict[str, Any]:
        """Only what is not as usual: rows are kept by the hundred thousand."""
        return {name: value for name, usual in _USUAL if (value := getattr(self, name)) != usual}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Example:
        """The example that `to_json` wrote."""
        for name in _TUPLES & value.keys():
            if isinstance(value[name], list):
                value[name] = tuple(value[name])
        return cls(**value)


_USUAL = [(field.name, field.default) for field in fields(Example)]
_TUPLES = {"messages", "words", "tags", "tools", "rejected"}


class BadRow(ValueError):
    """Why a row does not fit its format. `check` is the name of the check of the data that it fails."""

    def __init__(self, got: str, expected: str, *, check: str = "missing-fields") -> None:
        super().__init__(got)
        self.got, self.expected, self.check = clipped(got, _MOST), expected, check


@dataclass(frozen=True)
class Format:
    """One format: the columns that mark it, and the function that reads it."""

    columns: tuple[tuple[str, ...], ...]  # alternatives
    read: Callable[[Row], Example]


def string(values: Mapping[str, Any], name: str, *, answer: bool = False) -> str:
    """The text of a field. Raises BadRow where there is none; an empty `answer` is a check of its own."""
    value = values.get(name)
    if not isinstance(value, str):
        raise BadRow(f"{name} is {'missing' if value is None else type(value).__name__}", f"text in {name}")
    if not value.strip():
        check = "empty-answers" if answer else "missing-fields"
        raise BadRow(f"an empty {name}", f"text in {name}", check=check)
    return value


def optional(values: Mapping[str, Any], name: str) -> str:
    """The text of a field that may be missing or empty. Raises BadRow for anything but text."""
    value = values.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {type(value).__name__}", f"text in {name}, or nothing")
    return value


def weight_of(values: Mapping[str, Any]) -> float:
    """The row's `weight` in the loss: a number of at least 0, else 1."""
    value = values.get("weight")
    if value is None or value == "":
        return 1.0
    if isinstance(value, str):  # a table's cell
        try:
            value = float(value)
        except ValueError:
            raise BadRow(f"the weight {value!r}", "a number of at least 0 in weight") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise BadRow(f"the weight {value!r}", "a number of at least 0 in weight")
    return float(value)
