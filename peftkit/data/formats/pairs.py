"""Formats of pairs: questions with answers, instructions with outputs, sources with targets; and raw text."""

from __future__ import annotations

from peftkit.data.formats.base import BadRow, Example, Message, loss_weight, optional_text, reads, required_text
from peftkit.data.formats.chat import parse_list
from peftkit.data.read import Row


def _question_chat(row: Row, question: str, answer: str) -> Example:
    """Return a chat that ends in a question and its answer, so that the model's own template applies.

    `history` holds earlier questions with their answers, as in LLaMA-Factory's Alpaca format, where they are
    in the loss as well.
    """
    turns: list[Message] = []
    if system := optional_text(row.fields, "system").strip():
        turns.append({"role": "system", "content": system})
    history = parse_list(row.fields.get("history") or [], "history")
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow("a history that is not a list of pairs", "[[question, answer], ...] in history")
    for earlier_question, earlier_answer in history:
        pair = {"question": earlier_question, "answer": earlier_answer}
        turns.append({"role": "user", "content": required_text(pair, "question")})
        turns.append({"role": "assistant", "content": required_text(pair, "answer", answer=True)})
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Example(row.where, messages=tuple(turns), weight=loss_weight(row.fields))


@reads("instruction", ("instruction", "output"), optional=("input", "system", "history", "weight"))
def _instruction(row: Row) -> Example:
    """Read an Alpaca row: instruction, optional input, output; LLaMA-Factory's has system and history too."""
    instruction = required_text(row.fields, "instruction")
    context = optional_text(row.fields, "input")
    prompt = f"{instruction}\n\n{context}" if context else instruction
    return _question_chat(row, prompt, required_text(row.fields, "output", answer=True))


@reads("question-answer", ("question", "answer"), optional=("context", "system", "history", "weight"))
def _question_answer(row: Row) -> Example:
    """Read a question with its answer, and the optional context that it is about."""
    question = required_text(row.fields, "question")
    context = optional_text(row.fields, "context")
    prompt = f"{context}\n\n{question}" if context else question
    return _question_chat(row, prompt, required_text(row.fields, "answer", answer=True))


@reads("seq2seq", ("source", "target"))
def _seq2seq(row: Row) -> Example:
    """Read a source text and a target text."""
    source, target = required_text(row.fields, "source"), required_text(row.fields, "target", answer=True)
    return Example(row.where, prompt=source, completion=target, weight=loss_weight(row.fields))


@reads("text", ("text",))
def _text(row: Row) -> Example:
    return Example(row.where, completion=required_text(row.fields, "text", answer=True), weight=loss_weight(row.fields))
