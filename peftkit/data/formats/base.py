"""`Example`, the value that every data format is converted to, and the error of a row that does not fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from peftkit.data.read import Row
from peftkit.units import shorten

Message = Mapping[str, Any]
_MAX_CHARS = 300  # characters that are told of a row


@dataclass(frozen=True)
class Example:
    """One training example: a chat (`messages`), a prompt with its completion, raw text, or classified text.

    A message has role and content, and may have reasoning_content, tool_calls and a weight. `tags` has one class
    per word of `words`; without words, the classes of `prompt`. `rejected` is the answer that a preference turns
    down, as turns or text.
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
    repairs: tuple[str, ...] = ()  # of the order of its turns

    @property
    def key(self) -> str:
        """Return the input of the example: equal inputs go to the same side of a split."""
        if self.words:
            return " ".join(self.words)
        if self.messages:
            user_text = "\n".join(
                message["content"] for message in self.messages if message["role"] in {"user", "tool"}
            )
            return user_text or self.messages[0]["content"]
        return self.prompt or self.completion

    @property
    def answer(self) -> str:
        """Return the text that the model is trained to write."""
        if self.messages:
            return "\n".join(m["content"] for m in self.messages[self.num_given :] if m["role"] == "assistant")
        return self.completion or self.label or " ".join(self.tags)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults: rows are stored by the hundred thousand."""
        return {name: value for name, default in _DEFAULTS if (value := getattr(self, name)) != default}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Example:
        """Restore the example that `to_json` wrote."""
        for name in _TUPLES & value.keys():
            if isinstance(value[name], list):
                value[name] = tuple(value[name])
        return cls(**value)


_DEFAULTS = [(field.name, field.default) for field in fields(Example)]
_TUPLES = {"messages", "words", "tags", "tools", "rejected", "repairs"}


class BadRow(ValueError):
    """A row that does not fit its format. `check` is the name of the data check that it fails."""

    def __init__(self, got: str, expected: str, *, check: str = "missing-fields") -> None:
        super().__init__(got)
        self.got, self.expected, self.check = shorten(got, _MAX_CHARS), expected, check


@dataclass(frozen=True)
class Format:
    """One format: the columns that identify it, others that it reads, and the function that reads a row."""

    columns: tuple[tuple[str, ...], ...]  # alternatives
    optional: tuple[str, ...]
    read: Callable[[Row], Example]

    def used_columns(self, names: Collection[str]) -> frozenset[str]:
        """Return the columns that are read of rows with these: of alternatives, the first that is there."""
        identifying = next(columns for columns in self.columns if set(columns) <= set(names))
        return frozenset((*identifying, *self.optional))


READERS: dict[str, Format] = {}


def reads(
    name: str, *columns: tuple[str, ...], optional: tuple[str, ...] = ("weight",)
) -> Callable[[Callable[[Row], Example]], Callable[[Row], Example]]:
    """Register the function that reads a row of a format; any of `columns` marks the format.

    `optional` are the other columns that it reads: what is in neither is reported as not used.
    """

    def register(function: Callable[[Row], Example]) -> Callable[[Row], Example]:
        READERS[name] = Format(columns, optional, function)
        return function

    return register


def required_text(values: Mapping[str, object], name: str, *, answer: bool = False) -> str:
    """Return the text of a field; an `answer` may also be a number or a truth value.

    Raises BadRow if it has none; an empty `answer` fails `empty-answers`.
    """
    value = values.get(name)
    if answer and isinstance(value, float) and not math.isfinite(value):  # how tables hold what is missing
        raise BadRow(f"{name} is {value}", f"text in {name}", check="empty-answers")
    if answer and isinstance(value, bool | int | float):  # as JSON writes it: a table's 4, a true
        return str(value).lower()
    if not isinstance(value, str):
        raise BadRow(f"{name} is {'missing' if value is None else type(value).__name__}", f"text in {name}")
    if not value.strip():
        check = "empty-answers" if answer else "missing-fields"
        raise BadRow(f"an empty {name}", f"text in {name}", check=check)
    return value


def optional_text(values: Mapping[str, object], name: str) -> str:
    """Return the text of a field that may be missing or empty. Raises BadRow for anything but text."""
    value = values.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {type(value).__name__}", f"text in {name}, or nothing")
    return value


def as_boolean(value: object) -> bool | None:
    """Return a boolean as data hold it (true, "True", 1.0, a table's "0"); None for anything else."""
    if isinstance(value, int | float) and value in {0, 1}:
        return bool(value)
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    return known.get(value.strip().lower()) if isinstance(value, str) else None


def loss_weight(values: Mapping[str, object]) -> float:
    """Return the `weight` of a row or turn in the loss, 1 if it has none.

    Raises BadRow for anything but a number of at least 0.
    """
    value = values.get("weight")
    if value is None or value == "":
        return 1.0
    if isinstance(value, str):  # a table's cell
        try:
            value = float(value)
        except ValueError:
            raise BadRow(f"the weight {value!r}", "a number of at least 0 in weight") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise BadRow(f"the weight {value!r}", "a number of at least 0 in weight")
    return float(value)
