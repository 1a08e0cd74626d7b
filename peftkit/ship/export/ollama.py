"""Modelfile for Ollama: weights, chat template, stop tokens, context length.

Ollama gives an imported GGUF file the template `{{ .Prompt }}` unless the Modelfile says otherwise or it
knows the Jinja template in the file (ollama, docs/template.md). So the template is written out wherever Go's
template language can express it: the texts between messages are read off a rendered probe conversation.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from peftkit.errors import Problem, UserError
from peftkit.rundir import publish_folder, write_text
from peftkit.rundir.disk import resolve_new_folder
from peftkit.rundir.events import Observer
from peftkit.ship.card.write import write_card
from peftkit.ship.export.base import Exported, ExportOptions, file_sizes
from peftkit.ship.export.gguf.target import write_gguf
from peftkit.ship.export.gguf.tokenizer import load_local_tokenizer, stop_token_ids
from peftkit.ship.export.gguf.writing import require_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM_PROBE, _USER_PROBES, _ANSWER_PROBES = (
    "SystemProbe",
    ("UserProbeA", "UserProbeB", "UserProbeC"),
    ("AnswerProbeA", "AnswerProbeB"),
)
_DATE_WORDS = ("strftime_now", "date_string")


@dataclass(frozen=True)
class MessageSeparators:
    """Texts between the messages of a conversation that begins with the user or the system."""

    before_user: str
    user_to_answer: str
    answer_to_user: str
    after_user: str  # to where the model begins to write
    before_system: str | None  # None: the template takes no system message
    system_to_user: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Return all separators."""
        return (
            self.before_user,
            self.user_to_answer,
            self.answer_to_user,
            self.after_user,
            self.before_system or "",
            self.system_to_user,
        )


def write_modelfile(
    gguf: Path, out: Path, *, folder: Path, adapter: Path | None = None, name: str | None = None
) -> None:
    """Write a Modelfile beside or away from its GGUF file.

    `folder` has the tokenizer and generation_config.json that the file was made from; `adapter` is a LoRA in
    GGUF; `name` the name of the model in Ollama. Raises UserError where `out` exists.
    """
    if out.exists():
        raise UserError(Problem(str(out), "an existing file", "a new name", "remove it, or choose another name"))
    tokenizer = load_local_tokenizer(folder)
    # (context length, whether a start token is added) of a GGUF file
    reader = require_gguf(str(gguf)).GGUFReader(gguf)
    architecture = reader.fields["general.architecture"].contents()
    add_bos = reader.fields.get("tokenizer.ggml.add_bos_token")
    context, adds_bos = (
        int(reader.fields[f"{architecture}.context_length"].contents()),
        bool(add_bos and add_bos.contents()),
    )
    lines = [f"# ollama create {name or gguf.stem} -f {out.name}", f"FROM {_modelfile_path(gguf, out)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_modelfile_path(adapter, out)}")
    start = (tokenizer.bos_token or "") if adds_bos else ""
    if not tokenizer.chat_template:
        template_lines = ["# no TEMPLATE: the model has no chat template and continues the plain prompt"]
    else:
        separators = read_separators(tokenizer, start=start)
        if separators is None:
            template_lines = [
                "# no TEMPLATE: the chat template depends on more than the roles, which Go cannot express;",
                "# Ollama uses its own where it knows the template in the GGUF file, else the plain prompt",
            ]
        else:
            has_date = any(word in str(tokenizer.chat_template) for word in _DATE_WORDS)
            notes = ["# the template contains a date: that of the export"] if has_date else []
            template_lines = [*notes, f'TEMPLATE """{render_go_template(separators)}"""']
    lines += template_lines
    for i in stop_token_ids(tokenizer, folder):
        text = tokenizer.convert_ids_to_tokens(i)
        if text and '"' not in text and text.isprintable():
            lines.append(f'PARAMETER stop "{text}"')
    lines += ["# the longest context of the model; a shorter one needs less memory", f"PARAMETER num_ctx {context}"]
    write_text(out, "\n".join(lines) + "\n")


def _modelfile_path(path: Path, out: Path) -> str:
    """Return a path as the Modelfile names it: relative where both are in one folder."""
    path = path.resolve()
    return f"./{path.name}" if path.parent == out.resolve().parent else str(path)


def read_separators(tokenizer: PreTrainedTokenizerBase, *, start: str = "") -> MessageSeparators | None:
    """Read the separators of a chat template, without the start token; None where they are not constant."""
    roles = [("user", _USER_PROBES[0]), ("assistant", _ANSWER_PROBES[0]), ("user", _USER_PROBES[1])]
    roles += [("assistant", _ANSWER_PROBES[1]), ("user", _USER_PROBES[2])]
    without_system = _texts_between(tokenizer, roles)
    if without_system is None or without_system[1] != without_system[3] or without_system[2] != without_system[4]:
        return None
    with_system = _texts_between(tokenizer, [("system", _SYSTEM_PROBE), *roles])
    if with_system is not None and with_system[2:] != without_system[1:]:
        return None
    separators = MessageSeparators(
        without_system[0].removeprefix(start),
        without_system[1],
        without_system[2],
        without_system[5],
        with_system[0].removeprefix(start) if with_system else None,
        with_system[1] if with_system else "",
    )
    return None if any("{{" in text or '"""' in text or "}}" in text for text in separators.texts) else separators


def _texts_between(tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]]) -> list[str] | None:
    """Render messages and return the texts around their contents; None where refused or not found."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError):
        return None
    texts = []
    for _, content in messages:
        if text.count(content) != 1:
            return None
        before, text = text.split(content)
        texts.append(before)
    return [*texts, text]


def render_go_template(separators: MessageSeparators) -> str:
    """Render the separators as a template in Go's language.

    Ollama puts messages of one role together, so that after the system's the user and the model take turns.
    No `{{-` anywhere: it would swallow white space that belongs to the format.
    """
    if separators.before_system is None:
        system, after_system = "", ""
    else:
        system = '{{ if and (eq .Role "system") (eq $i 0) }}' + separators.before_system + "{{ .Content }}{{ end }}"
        after_system = "{{ else if and (eq $i 1) $.System }}" + separators.system_to_user
    first = "{{ if eq $i 0 }}" + separators.before_user
    user = first + after_system + "{{ else }}" + separators.answer_to_user + "{{ end }}{{ .Content }}"
    return (
        "{{ range $i, $_ := .Messages }}"
        + system
        + '{{ if eq .Role "user" }}'
        + user
        + '{{ else if eq .Role "assistant" }}'
        + separators.user_to_answer
        + "{{ .Content }}{{ end }}"
        + '{{ if and (eq (len (slice $.Messages $i)) 1) (ne .Role "assistant") }}'
        + separators.after_user
        + "{{ end }}{{ end }}"
    )


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """Write a folder for `ollama create NAME -f Modelfile`. Raises UserError as the GGUF export does."""
    if options.lora:
        got, fix = "an adapter without its base", "leave out --lora: Ollama runs the merged model everywhere"
        raise UserError(Problem("--lora", got, "the merged model", fix))
    out = resolve_new_folder(str(options.out))
    with publish_folder(out) as staging:

        def add_modelfile(gguf: Path, folder: Path) -> None:
            write_modelfile(gguf, staging / "Modelfile", folder=folder, name=out.name)

        report, notes = write_gguf(path, staging, out, options, observer, on_written=add_modelfile)
        write_card(staging, path, name=out.name, layout="gguf", merge_report=report)
    name = shlex.quote(out.name)
    command = f"cd {shlex.quote(str(out))} && ollama create {name} -f Modelfile && ollama run {name}"
    return Exported(str(out), file_sizes(out), (*notes, command), report)
