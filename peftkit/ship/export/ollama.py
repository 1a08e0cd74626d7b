"""A Modelfile for Ollama: weights, chat template, stop tokens, context length.

Ollama gives an imported GGUF file the template `{{ .Prompt }}` unless the Modelfile says otherwise or it
knows the Jinja template in the file (ollama, docs/template.md). So the template is written out wherever the
model has one that Go's language can say: how a conversation is glued together is read off a rendered probe.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.rundir import publish_folder, write_text
from peftkit.rundir.disk import new_folder
from peftkit.ship.card.write import write_card
from peftkit.ship.export.base import Exported, ExportOptions, Observer, files_in
from peftkit.ship.export.gguf.target import write_gguf
from peftkit.ship.export.gguf.tokenizer import load_tokenizer, stop_ids
from peftkit.ship.export.gguf.writing import require_gguf

_SYSTEM, _USERS, _ANSWERS = (
    "SystemProbe",
    ("UserProbeA", "UserProbeB", "UserProbeC"),
    ("AnswerProbeA", "AnswerProbeB"),
)
_DATED = ("strftime_now", "date_string")


@dataclass(frozen=True)
class Glue:
    """The texts between the messages of a conversation that begins with the user or the system."""

    before_user: str
    user_to_answer: str
    answer_to_user: str
    after_user: str  # to where the model begins to write
    before_system: str | None  # None: the template takes no system message
    system_to_user: str

    @property
    def texts(self) -> tuple[str, ...]:
        """All of them."""
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
    GGUF; `name` what the model shall be called. Raises UserError where `out` exists.
    """
    if out.exists():
        raise UserError(
            Problem(str(out), "a file that is there already", "a new name", "remove it, or rename")
        )
    tokenizer = load_tokenizer(folder)
    context, adds_start = _header(gguf)
    lines = [f"# ollama create {name or gguf.stem} -f {out.name}", f"FROM {_beside(gguf, out)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_beside(adapter, out)}")
    lines += _template_lines(tokenizer, start=(tokenizer.bos_token or "") if adds_start else "")
    for i in stop_ids(tokenizer, folder):
        text = tokenizer.convert_ids_to_tokens(i)
        if text and '"' not in text and text.isprintable():
            lines.append(f'PARAMETER stop "{text}"')
    lines += [
        "# the longest context that the model was made for; less takes less memory",
        f"PARAMETER num_ctx {context}",
    ]
    write_text(out, "\n".join(lines) + "\n")


def _header(gguf: Path) -> tuple[int, bool]:
    """(context length, whether a start token is added) of a GGUF file."""
    reader = require_gguf(str(gguf)).GGUFReader(gguf)
    architecture = reader.fields["general.architecture"].contents()
    starts = reader.fields.get("tokenizer.ggml.add_bos_token")
    return int(reader.fields[f"{architecture}.context_length"].contents()), bool(starts and starts.contents())


def _beside(path: Path, out: Path) -> str:
    """A path as the Modelfile names it: relative to itself where both stand in one folder."""
    path = path.resolve()
    return f"./{path.name}" if path.parent == out.resolve().parent else str(path)


def _template_lines(tokenizer: Any, *, start: str) -> list[str]:
    """The TEMPLATE, or why there is none. `start` is put in front by Ollama itself."""
    if not tokenizer.chat_template:
        return ["# no TEMPLATE: the model has no chat template, and goes on from the plain prompt"]
    glue = glue_of(tokenizer, start=start)
    if glue is None:
        return [
            "# no TEMPLATE: the chat template looks at more than the roles, and Go's language cannot follow;",
            "# Ollama takes one of its own where it knows the one in the GGUF file, else the plain prompt",
        ]
    dated = any(word in str(tokenizer.chat_template) for word in _DATED)
    notes = ["# the template has a date in it: that of the export"] if dated else []
    return [*notes, f'TEMPLATE """{go_template(glue)}"""']


def glue_of(tokenizer: Any, *, start: str = "") -> Glue | None:
    """How the chat template joins messages, without the start token; None where that is not constant."""
    roles = [("user", _USERS[0]), ("assistant", _ANSWERS[0]), ("user", _USERS[1])]
    roles += [("assistant", _ANSWERS[1]), ("user", _USERS[2])]
    plain = _between(tokenizer, roles)
    if plain is None or plain[1] != plain[3] or plain[2] != plain[4]:
        return None
    led = _between(tokenizer, [("system", _SYSTEM), *roles])
    if led is not None and led[2:] != plain[1:]:
        return None
    glue = Glue(
        plain[0].removeprefix(start),
        plain[1],
        plain[2],
        plain[5],
        led[0].removeprefix(start) if led else None,
        led[1] if led else "",
    )
    return None if any("{{" in text or '"""' in text or "}}" in text for text in glue.texts) else glue


def _between(tokenizer: Any, messages: list[tuple[str, str]]) -> list[str] | None:
    """The texts around the contents of a conversation; None where it is refused or a content is not found."""
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError):
        return None
    found = []
    for _, content in messages:
        if text.count(content) != 1:
            return None
        before, text = text.split(content)
        found.append(before)
    return [*found, text]


def go_template(glue: Glue) -> str:
    """The same conversation in Go's template language.

    Ollama puts messages of one role together, so that after the system's the user and the model take turns.
    No `{{-` anywhere: it would swallow white space that belongs to the format.
    """
    if glue.before_system is None:
        system, led = "", ""
    else:
        system = '{{ if and (eq .Role "system") (eq $i 0) }}' + glue.before_system + "{{ .Content }}{{ end }}"
        led = "{{ else if and (eq $i 1) $.System }}" + glue.system_to_user
    first = "{{ if eq $i 0 }}" + glue.before_user
    user = first + led + "{{ else }}" + glue.answer_to_user + "{{ end }}{{ .Content }}"
    return (
        "{{ range $i, $_ := .Messages }}"
        + system
        + '{{ if eq .Role "user" }}'
        + user
        + '{{ else if eq .Role "assistant" }}'
        + glue.user_to_answer
        + "{{ .Content }}{{ end }}"
        + '{{ if and (eq (len (slice $.Messages $i)) 1) (ne .Role "assistant") }}'
        + glue.after_user
        + "{{ end }}{{ end }}"
    )


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """A folder for `ollama create NAME -f Modelfile`. Raises UserError as the GGUF export does."""
    pass  # MOVED

    if options.lora:
        got, fix = "an adapter alone", "leave out --lora: the merged model is what Ollama runs everywhere"
        raise UserError(Problem("--lora", got, "a whole model", fix))
    out = new_folder(str(options.out))
    with publish_folder(out) as staging:

        def modelfile(gguf: Path, folder: Path) -> None:
            write_modelfile(gguf, staging / "Modelfile", folder=folder, name=out.name)

        report, notes = write_gguf(path, staging, out, options, observer, beside=modelfile)
        write_card(staging, path, name=out.name, layout="gguf", merge_report=report)
    name = shlex.quote(out.name)
    said = f"cd {shlex.quote(str(out))} && ollama create {name} -f Modelfile && ollama run {name}"
    return Exported(str(out), files_in(out), (*notes, said), report)
