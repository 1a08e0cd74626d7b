"""How chats are rendered: which template, and what tells where answers stand, proven on a sample.

The only home of TRL in `data/`: its training templates carry generation markers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.data.chat.render import is_safe, render_chat
from peftkit.data.chat.template import (
    NO_CHATS,
    Style,
    apply,
    by_markers,
    by_prefixes,
    ensure_template,
    misplaced,
    takes_default,
    template_of,
)
from peftkit.data.formats import Example
from peftkit.errors import Problem, UserError
from peftkit.units import show_bytes

_SAMPLE = 24
_LONGEST_BYTES = 16 * 2**20
_ASKED, _SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
# turns that the sample may lack: the prompt for an answer may be another after a tool's turn
_PROBES = (
    Example("", messages=(_ASKED, _SAID)),
    Example(
        "",
        messages=(
            _ASKED,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "f", "content": "1"},
            _SAID,
        ),
    ),
)
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _proves(examples: Sequence[Example], tokenizer: Any, marked: str, *, same_text: bool) -> bool:
    """Whether a template's markers give whole answers of chats that the model's own template takes as well.

    With `same_text`, whether it writes them alike.
    """
    try:
        for example in examples:
            made = by_markers(example, tokenizer, marked, within=True)
            own = apply(tokenizer, example.messages, example.tools, ask=False, where="")
            if (same_text and made.text != own) or misplaced(example, made):
                return False
    except UserError:
        return False
    return True


def _within(examples: Sequence[Example], tokenizer: Any, marked: str) -> bool:
    """Whether spans that a template marks begin before the prompt for the answer ends."""
    for example in examples:
        try:
            exact, as_marked = (by_markers(example, tokenizer, marked, within=w) for w in (True, False))
        except UserError:  # a probe that this template does not take
            continue
        if exact.answers != as_marked.answers:
            return True
    return False


def _prefixes_hold(examples: Sequence[Example], tokenizer: Any, mask: str) -> bool:
    try:
        for example in examples:
            by_prefixes(example, tokenizer, last_only=mask == "last-turn")
    except UserError:
        return False
    return True


def _training_template(tokenizer: Any) -> str | None:
    """TRL's template with generation markers for the model's own one, where it knows it.

    TRL tries the model's own template for that: one that is not safe here, TRL does not know either.
    """
    if not is_safe(template_of(tokenizer)):
        return None
    from trl.chat_template_utils import get_training_chat_template

    try:
        found: str | None = get_training_chat_template(processing_class=tokenizer)
        return found
    except Exception:  # noqa: BLE001  whatever its probes raise, there is another way
        return None


def read_template(path: Path) -> str:
    """A chat template from a file. Raises UserError where there is none, or it is no Jinja template."""
    import jinja2

    from peftkit.data.chat.bounded import Generation

    try:
        if path.stat().st_size > _LONGEST_BYTES:
            got = f"{path} of {show_bytes(path.stat().st_size)}"
            raise UserError(Problem("data.chat.template", got, f"at most {show_bytes(_LONGEST_BYTES)}"))
        text = path.read_text(encoding="utf-8")
        jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(text)
        render_chat([_ASKED], template=text)
    except OSError as error:
        got = f"{path}, which cannot be read ({error.strerror})"
        raise UserError(Problem("data.chat.template", got, "a file with a Jinja template")) from None
    except UnicodeDecodeError:
        raise UserError(Problem("data.chat.template", f"{path}, which is no UTF-8", "UTF-8 text")) from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(Problem(f"{path}:{error.lineno}", str(error), "a Jinja template")) from None
    except (jinja2.TemplateError, TypeError):
        return text  # it takes other turns
    return text


def choose_style(examples: Sequence[Example], tokenizer: Any, *, mask: str, source: str = "") -> Style:
    """How the chats among `examples` are rendered, proven on a sample of them.

    Markers of the model's own template serve first, TRL's training templates next, prefixes last. The
    tokenizer gets the default template where it has none, and nothing where there are no chats.
    """
    chats = next((i for i, example in enumerate(examples) if example.messages), None)
    if chats is None:
        return NO_CHATS
    default = ensure_template(tokenizer)
    source = source or ("the default" if default else "the model's own")
    step = max(1, len(examples) // _SAMPLE)
    spread = [examples[i] for i in (chats, *range(0, len(examples), step))]
    sample = [example for example in spread if example.messages][: _SAMPLE + 1]
    own = template_of(tokenizer)
    plain = [e for e in sample if takes_default(e, tokenizer)]

    def by(marked: str, reason: str) -> Style:
        return Style(source, marked, reason, _within([*plain, *_PROBES], tokenizer, marked))

    if _MARKER.search(own) and _proves(plain, tokenizer, own, same_text=False):
        return by(own, "its generation markers")
    training = None if default else _training_template(tokenizer)
    if training and _proves(plain, tokenizer, training, same_text=True):
        return by(training, "TRL's training template, which renders the same text")
    if _prefixes_hold(sample, tokenizer, mask):
        return Style(source, None, "what is added beyond the prompt for an answer")
    if training and _proves(plain, tokenizer, training, same_text=False):
        return by(training, "TRL's training template: the model's own rewrites earlier turns")
    return Style(source, None, "what is added beyond the prompt for an answer")
