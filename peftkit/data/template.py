"""Examples as text, with the spans that an answer covers. Training and generation render the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftkit.data.formats import Example
from peftkit.errors import Problem, UserError

# For bases that bring no chat template. Stored with the adapter, so that inference renders alike.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Assistant:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}### User:\n{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of an answer."""

    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """An example as the model sees it, and where its answers stand, first to last."""

    text: str
    answers: tuple[Span, ...]
    where: str


def ensure_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the default one. Returns whether it was needed."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return True


def _apply(tokenizer: Any, messages: Any, *, ask: bool, where: str) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except jinja2.TemplateError as error:
        raise UserError(
            Problem(
                where,
                f"a chat that the model's template refuses ({error})",
                "turns in the order that the template knows",
            )
        ) from None


def render(example: Example, tokenizer: Any) -> Rendered:
    """Text and answer spans of an example.

    A chat is rendered turn by turn: what the template adds for an assistant turn beyond the prompt for it is
    the answer. That holds only for templates in which earlier turns do not change when later ones come; where
    it does not hold, UserError says so (never a wrong mask).
    """
    if not example.messages:
        text = example.prompt + example.completion
        return Rendered(text, (Span(len(example.prompt), len(text)),), example.where)
    text = _apply(tokenizer, example.messages, ask=False, where=example.where)
    answers = []
    for i, message in enumerate(example.messages):
        if message["role"] != "assistant" or i < example.num_given:
            continue
        before = _apply(tokenizer, example.messages[:i], ask=True, where=example.where)
        after = _apply(tokenizer, example.messages[: i + 1], ask=False, where=example.where)
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                Problem(
                    example.where,
                    "a chat template that rewrites earlier turns",
                    "a template whose prompt is a prefix of the whole chat",
                    "use data.mask: last-turn with single-turn chats, or another template",
                )
            )
        answers.append(Span(len(before), len(after)))
    return Rendered(text, tuple(answers), example.where)


def render_prompt(example: Example, tokenizer: Any) -> tuple[str, str]:
    """(prompt, reference answer) of an example's last turn, for generation."""
    if not example.messages:
        return example.prompt, example.completion
    prompt = _apply(tokenizer, example.messages[:-1], ask=True, where=example.where)
    return prompt, example.messages[-1]["content"]


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts a start token before plain text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
