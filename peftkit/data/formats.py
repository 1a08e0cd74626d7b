"""Formats of training data: one function each turns a row into an `Example`. A new one is a row below."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.data.read import MAX_PROBLEMS, Row
from peftkit.errors import Problem, UserError, nearest

Message = Mapping[str, str]
_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


@dataclass(frozen=True)
class Example:
    """One training example: a chat (`messages`), a prompt with its completion, raw text, or classified text.

    `tags` has one class per word of `words`, for token classification.
    """

    where: str
    messages: tuple[Message, ...] = ()
    num_given: int = 0  # leading turns that are prompt, whoever speaks
    prompt: str = ""
    completion: str = ""
    label: str = ""
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What makes two examples the same for splitting: their input."""
        if self.words:
            return " ".join(self.words)
        if self.messages:
            return "\n".join(m["content"] for m in self.messages if m["role"] != "assistant")
        return self.prompt or self.completion


class _BadRow(ValueError):
    """Why a row does not fit its format."""

    def __init__(self, got: str, expected: str) -> None:
        super().__init__(got)
        self.got, self.expected = got, expected


def _string(fields: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise _BadRow(f"{name} is {'missing' if value is None else type(value).__name__}", f"text in {name}")
    if not value.strip() and not empty:
        raise _BadRow(f"an empty {name}", f"text in {name}")
    return value


def _messages(turns: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise _BadRow(
            f"{name} is {'empty' if turns == [] else type(turns).__name__}", f"a list of turns in {name}"
        )
    found = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise _BadRow(f"a turn that is {type(turn).__name__}", "turns with role and content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _ROLES:
            raise _BadRow(f"the role {role!r}", f"one of {', '.join(sorted(_ROLES))}")
        if not isinstance(content, str):
            raise _BadRow(f"a turn whose content is {type(content).__name__}", "text")
        found.append({"role": _ROLES[role], "content": content})
    if found[0]["role"] == "assistant":
        raise _BadRow("a chat that begins with assistant", "a user or system turn first")
    if found[-1]["role"] != "assistant":
        raise _BadRow(f"a chat that ends with {found[-1]['role']}", "an assistant turn to learn at the end")
    if not found[-1]["content"].strip():
        raise _BadRow("an empty answer", "text in the last assistant turn")
    return tuple(found)


def _chat(row: Row) -> Example:
    name = "messages" if "messages" in row.fields else "conversations"
    return Example(row.where, messages=_messages(row.fields.get(name), name))


def _prompt_completion(row: Row) -> Example:
    prompt, completion = row.fields.get("prompt"), row.fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _messages([*prompt, *completion], "prompt and completion")
        return Example(row.where, messages=turns, num_given=len(prompt))
    return Example(
        row.where, prompt=_string(row.fields, "prompt"), completion=_string(row.fields, "completion")
    )


def _instruction(row: Row) -> Example:
    """Alpaca: instruction, optional input, output. As a chat, so that the model's own template serves."""
    instruction = _string(row.fields, "instruction")
    context = row.fields.get("input") or ""
    asked = f"{instruction}\n\n{context}" if context else instruction
    answer = {"role": "assistant", "content": _string(row.fields, "output")}
    system = row.fields.get("system")
    first = ({"role": "system", "content": system},) if isinstance(system, str) and system else ()
    return Example(row.where, messages=(*first, {"role": "user", "content": asked}, answer))


def _class(value: Any, name: str) -> str:
    """A class as text: whole numbers and text are classes, nothing else is."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _BadRow(f"{name} is {value!r}", f"a class in {name}, as text or a whole number")
    return str(value)


def _classification(row: Row) -> Example:
    return Example(
        row.where, prompt=_string(row.fields, "text"), label=_class(row.fields.get("label"), "label")
    )


def _token_classification(row: Row) -> Example:
    words, name = row.fields.get("tokens"), "tags" if "tags" in row.fields else "ner_tags"
    tags = row.fields.get(name)
    if not isinstance(words, list) or not isinstance(tags, list) or not words:
        raise _BadRow(f"tokens and {name} that are not lists", f"a list of words and a list of {name}")
    if len(words) != len(tags):
        raise _BadRow(f"{len(words)} tokens with {len(tags)} {name}", "one tag for each token")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise _BadRow("a token that is empty or no text", "words as text")
    return Example(row.where, words=tuple(words), tags=tuple(_class(tag, name) for tag in tags))


def _text(row: Row) -> Example:
    return Example(row.where, completion=_string(row.fields, "text"))


@dataclass(frozen=True)
class Format:
    """One format: the columns that mark it, and the function that reads it."""

    columns: tuple[tuple[str, ...], ...]  # alternatives
    read: Callable[[Row], Example]


FORMATS: dict[str, Format] = {
    "chat": Format((("messages",), ("conversations",)), _chat),
    "prompt-completion": Format((("prompt", "completion"),), _prompt_completion),
    "instruction": Format((("instruction", "output"),), _instruction),
    "token-classification": Format((("tokens", "tags"), ("tokens", "ner_tags")), _token_classification),
    "classification": Format((("text", "label"),), _classification),
    "text": Format((("text",),), _text),
}


def _wants() -> str:
    return "; ".join(
        f"{name}: {' or '.join(' + '.join(c) for c in spec.columns)}" for name, spec in FORMATS.items()
    )


def _columns_problem(where: str, found: Sequence[str], expected: str) -> UserError:
    words = [name for spec in FORMATS.values() for columns in spec.columns for name in columns]
    hints = [f"{column} looks like {close[0]}" for column in found if (close := nearest(column, words))]
    fix = f"map your columns, for example columns: {{prompt: {found[0] if found else 'question'}}}"
    return UserError(Problem(where, f"the columns {', '.join(found)}", expected, "; ".join([*hints, fix])))


def detect(rows: Sequence[Row]) -> str:
    """The format that the first row's columns name. Raises UserError listing what each format wants."""
    found = list(rows[0].fields)
    for name, spec in FORMATS.items():
        if any(set(columns) <= set(found) for columns in spec.columns):
            return name
    raise _columns_problem(rows[0].where, found, f"the columns of a format ({_wants()})")


def rename(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Row]:
    """Apply the recipe's `columns`: our name -> the data's name. Raises UserError for absent columns."""
    if not columns:
        return list(rows)
    missing = [name for name in columns.values() if name not in rows[0].fields]
    if missing:
        raise UserError(
            [
                Problem(
                    "data.columns",
                    f"{name!r}, which {rows[0].where} lacks",
                    "a column of the data",
                    f"found: {', '.join(rows[0].fields)}",
                )
                for name in missing
            ]
        )
    taken = set(columns.values())
    return [
        Row(
            {
                **{k: v for k, v in row.fields.items() if k not in taken},
                **{ours: row.fields.get(theirs) for ours, theirs in columns.items()},
            },
            row.where,
        )
        for row in rows
    ]


def labels_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The classes that occur, sorted: numbers by value, text by alphabet; empty without classes."""
    found = {example.label for example in examples if example.label}
    found |= {tag for example in examples for tag in example.tags}
    if found and all(re.fullmatch(r"-?\d+", label, re.ASCII) for label in found):
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    return tuple(sorted(found))


def to_examples(rows: Sequence[Row], name: str) -> list[Example]:
    """Rows as examples of a format. Raises UserError with file and line of every row that does not fit."""
    spec = FORMATS[name]
    found = set(rows[0].fields)
    if not any(set(columns) <= found for columns in spec.columns):
        wanted = " or ".join(" + ".join(columns) for columns in spec.columns)
        raise _columns_problem(rows[0].where, list(rows[0].fields), f"the columns of {name}: {wanted}")
    examples, problems = [], []
    for row in rows:
        try:
            examples.append(spec.read(row))
        except _BadRow as bad:
            problems.append(Problem(row.where, bad.got, bad.expected))
    if problems:
        more = len(problems) - MAX_PROBLEMS
        extra = (
            [Problem("data", f"{more} more rows that do not fit", f"the format {name}")] if more > 0 else []
        )
        raise UserError([*problems[:MAX_PROBLEMS], *extra])
    return examples
