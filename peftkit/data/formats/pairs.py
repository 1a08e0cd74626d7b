"""Formats of pairs: questions with answers, instructions with outputs, sources with targets; and raw text."""

from __future__ import annotations

from peftkit.data.formats.base import Example, loss_weight, optional_text, reads, required_text
from peftkit.data.read import Row


def _single_turn_chat(row: Row, question: str, answer: str) -> Example:
    """Return a chat of one question and its answer, so that the model's own template applies."""
    system = row.fields.get("system")
    system_turns = ({"role": "system", "content": system},) if isinstance(system, str) and system.strip() else ()
    turns = (*system_turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example(row.where, messages=turns, weight=loss_weight(row.fields))


@reads("instruction", ("instruction", "output"))
def _instruction(row: Row) -> Example:
    """Read an Alpaca row: instruction, optional input, output."""
    instruction = required_text(row.fields, "instruction")
    context = optional_text(row.fields, "input")
    prompt = f"{instruction}\n\n{context}" if context else instruction
    return _single_turn_chat(row, prompt, required_text(row.fields, "output", answer=True))


@reads("question-answer", ("question", "answer"))
def _question_answer(row: Row) -> Example:
    """Read a question with its answer, and the optional context that it is about."""
    question = required_text(row.fields, "question")
    context = optional_text(row.fields, "context")
    prompt = f"{context}\n\n{question}" if context else question
    return _single_turn_chat(row, prompt, required_text(row.fields, "answer", answer=True))


@reads("seq2seq", ("source", "target"))
def _seq2seq(row: Row) -> Example:
    """Read a source text and a target text."""
    source, target = required_text(row.fields, "source"), required_text(row.fields, "target", answer=True)
    return Example(row.where, prompt=source, completion=target, weight=loss_weight(row.fields))


@reads("text", ("text",))
def _text(row: Row) -> Example:
    return Example(row.where, completion=required_text(row.fields, "text", answer=True), weight=loss_weight(row.fields))
