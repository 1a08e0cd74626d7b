"""Questions with answers, instructions with outputs, sources with targets, and raw text."""

from __future__ import annotations

from peftkit.data.formats.base import Example, Format, optional, string, weight_of
from peftkit.data.read import Row


def _asked(row: Row, asked: str, answer: str) -> Example:
    """A single question as a chat, so that the model's own template serves."""
    system = row.fields.get("system")
    first = ({"role": "system", "content": system},) if isinstance(system, str) and system.strip() else ()
    turns = (*first, {"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    return Example(row.where, messages=turns, weight=weight_of(row.fields))


def _instruction(row: Row) -> Example:
    """Alpaca: instruction, optional input, output."""
    instruction = string(row.fields, "instruction")
    context = optional(row.fields, "input")
    asked = f"{instruction}\n\n{context}" if context else instruction
    return _asked(row, asked, string(row.fields, "output", answer=True))


def _question_answer(row: Row) -> Example:
    """A question with its answer, and perhaps the context that it is about."""
    question = string(row.fields, "question")
    context = optional(row.fields, "context")
    asked = f"{context}\n\n{question}" if context else question
    return _asked(row, asked, string(row.fields, "answer", answer=True))


def _seq2seq(row: Row) -> Example:
    """One text to read and one to write."""
    source, target = string(row.fields, "source"), string(row.fields, "target", answer=True)
    return Example(row.where, prompt=source, completion=target, weight=weight_of(row.fields))


def _text(row: Row) -> Example:
    return Example(
        row.where, completion=string(row.fields, "text", answer=True), weight=weight_of(row.fields)
    )


FORMATS = {
    "instruction": Format((("instruction", "output"),), _instruction),
    "question-answer": Format((("question", "answer"),), _question_answer),
    "seq2seq": Format((("source", "target"),), _seq2seq),
}
TEXT = {"text": Format((("text",),), _text)}
