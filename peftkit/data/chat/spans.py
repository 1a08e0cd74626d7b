"""Choice of how chats are rendered: which template, and what locates the answers, verified on a sample.

The only importer of TRL in `data/`: its training templates carry generation markers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.data.chat.template import (
    NO_CHATS,
    Style,
    apply_template,
    ensure_chat_template,
    has_misplaced_answer,
    render_by_markers,
    render_by_prefixes,
    select_template,
    uses_main_template,
)
from peftkit.data.formats import Example
from peftkit.data.jinja.render import is_known_template, render_chat
from peftkit.errors import Problem, UserError
from peftkit.units import show_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE_CHATS = 24
_MAX_TEMPLATE_BYTES = 16 * 2**20
_USER_TURN, _ASSISTANT_TURN = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
_TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
# turns that the sample may lack: the prompt for an answer may be another after a tool's turn
_PROBE_CHATS = (
    Example("", messages=(_USER_TURN, _ASSISTANT_TURN)),
    Example(
        "",
        messages=(
            _USER_TURN,
            {"role": "assistant", "content": "", "tool_calls": [_TOOL_CALL]},
            {"role": "tool", "name": "f", "content": "1"},
            _ASSISTANT_TURN,
        ),
    ),
)
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _markers_are_valid(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str, *, same_text: bool
) -> bool:
    """Return True where a template's markers cover whole answers, on chats that the model's own takes too.

    With `same_text`, also only where it renders the same text.
    """
    try:
        for example in examples:
            rendered = render_by_markers(example, tokenizer, template, within=True)
            own_text = apply_template(tokenizer, example.messages, example.tools, add_generation_prompt=False, where="")
            if (same_text and rendered.text != own_text) or has_misplaced_answer(example, rendered):
                return False
    except UserError:
        return False
    return True


def _markers_include_prompt(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether spans that a template marks begin before the prompt for the answer ends."""
    for example in examples:
        try:
            trimmed, as_marked = (render_by_markers(example, tokenizer, template, within=w) for w in (True, False))
        except UserError:  # a probe that this template does not take
            continue
        if trimmed.answers != as_marked.answers:
            return True
    return False


def _prefixes_hold(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, mask: str) -> bool:
    try:
        for example in examples:
            render_by_prefixes(example, tokenizer, last_only=mask == "last-turn")
    except UserError:
        return False
    return True


def _find_training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's template with generation markers for the model's own one; None where TRL knows none.

    TRL renders the model's own template to compare it: one that is not known is not tried.
    """
    if not is_known_template(select_template(tokenizer)):
        return None
    from trl.chat_template_utils import get_training_chat_template

    try:
        template: str | None = get_training_chat_template(processing_class=tokenizer)
        return template
    except Exception:  # noqa: BLE001  whatever its probes raise, there is another way
        return None


def read_template(path: Path) -> str:
    """Read a chat template from a file. Raises UserError where it cannot be read, or is no Jinja template."""
    import jinja2.ext

    try:
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            got = f"{path} of {show_bytes(path.stat().st_size)}"
            raise UserError(Problem("data.chat.template", got, f"at most {show_bytes(_MAX_TEMPLATE_BYTES)}"))
        text = path.read_text(encoding="utf-8")

        class GenerationTag(jinja2.ext.Extension):
            """transformers' {% generation %} around what the assistant says, for parsing alone."""

            tags = {"generation"}  # noqa: RUF012  Jinja's own way

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                return jinja2.nodes.Scope(
                    parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
                )

        jinja2.Environment(extensions=[GenerationTag, "jinja2.ext.loopcontrols"]).parse(text)
        render_chat([_USER_TURN], template=text)
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


def choose_style(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, mask: str, source: str = ""
) -> Style:
    """Choose how the chats among `examples` are rendered, verified on a sample of them.

    Markers of the model's own template come first, TRL's training templates next, rendering prefixes last. A
    tokenizer without a template gets the default one; nothing changes where there are no chats.
    """
    first_chat = next((i for i, example in enumerate(examples) if example.messages), None)
    if first_chat is None:
        return NO_CHATS
    used_default = ensure_chat_template(tokenizer)
    source = source or ("the default" if used_default else "the model's own")
    step = max(1, len(examples) // _SAMPLE_CHATS)
    spaced_examples = [examples[i] for i in (first_chat, *range(0, len(examples), step))]
    sample = [example for example in spaced_examples if example.messages][: _SAMPLE_CHATS + 1]
    own_template = select_template(tokenizer)
    main_template_chats = [e for e in sample if uses_main_template(e, tokenizer)]

    def by(template: str, reason: str) -> Style:
        return Style(
            source,
            template,
            reason,
            _markers_include_prompt([*main_template_chats, *_PROBE_CHATS], tokenizer, template),
        )

    if _GENERATION_MARKER.search(own_template) and _markers_are_valid(
        main_template_chats, tokenizer, own_template, same_text=False
    ):
        return by(own_template, "its generation markers")
    training_template = None if used_default else _find_training_template(tokenizer)
    if training_template and _markers_are_valid(main_template_chats, tokenizer, training_template, same_text=True):
        return by(training_template, "TRL's training template, which renders the same text")
    if _prefixes_hold(sample, tokenizer, mask):
        return Style(source, None, "what is added beyond the prompt for an answer")
    if training_template and _markers_are_valid(main_template_chats, tokenizer, training_template, same_text=False):
        return by(training_template, "TRL's training template: the model's own rewrites earlier turns")
    return Style(source, None, "what is added beyond the prompt for an answer")
