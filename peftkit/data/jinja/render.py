"""Rendering of templates: known chat templates in this process, by transformers, all others in a sandbox.

A template comes with a model or a recipe, from whoever made it. Those that TRL ships and peftkit's own, word
for word, are rendered here. Any other is rendered in a process that may take 10 seconds a chat and a
gigabyte, and do nothing else; what is rendered together is sent together.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.units import shorten

TIMEOUT_SECONDS = 10.0  # for one chat: those in use take a thousandth of one
_START_SECONDS = 120.0
_MAX_GROUP_CHARACTERS = 2**18
_PROGRAM = Path(__file__).with_name("sandbox.py")
_ENVIRONMENT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV")
_OWN_SHA256 = {  # peftkit's default template, and that of the embedded SmolLM2
    "faf29bd0a5a01ad36812a6b17ac7ec543ad264008d6abebd1ab101763edfef2c",
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
}
TextAndSpans = tuple[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class ChatRequest:
    """A chat to render: its turns and tools, and transformers' options with the special tokens."""

    turns: Sequence[Mapping[str, Any]]
    tools: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=64)
def is_known_template(template: str) -> bool:
    """Return True for templates that TRL ships, reviewed and maintained there, and for peftkit's own."""
    return hashlib.sha256(template.encode()).hexdigest() in _OWN_SHA256 or template in _trl_templates()


@lru_cache(maxsize=1)
def _trl_templates() -> frozenset[str]:
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path("trl")
    return frozenset(path.read_text(encoding="utf-8") for path in folder.glob("*.jinja"))


class _Sandbox:
    """The sandbox process, started on first use; one for each process that needs it."""

    def __init__(self) -> None:
        self.owner_pid = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""
        self.lock = threading.Lock()
        self.limits: dict[str, str] = {}  # of templates that went beyond them: never tried again

    def stop(self) -> None:
        """Kill the sandbox process, if this process started it."""
        if self.process is not None and self.owner_pid == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None

    def _read_line(self, seconds: float) -> bytes:
        """Return the process's next line. Raises TimeoutError, and EOFError where the process has ended."""
        assert self.process is not None and self.process.stdout is not None
        deadline, pieces = time.monotonic() + seconds, [self.buffer]
        while b"\n" not in pieces[-1]:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self.process.stdout], [], [], remaining)[0]:
                raise TimeoutError
            piece = os.read(self.process.stdout.fileno(), 2**20)
            if not piece:
                raise EOFError
            pieces.append(piece)
        line, _, self.buffer = b"".join(pieces).partition(b"\n")
        return line

    def _exchange(self, kind: str, template: str, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Send items as JSON texts and return the results, up to the first that exceeds a limit.

        A request is one line, read whole before it is answered: neither side waits for the other.
        """
        if self.process is None or self.owner_pid != os.getpid() or self.process.poll() is not None:
            environment = {name: os.environ[name] for name in _ENVIRONMENT_VARIABLES if name in os.environ}
            self.owner_pid, self.buffer = os.getpid(), b""
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us: it would be taken for a bad template
                env={**environment, "HF_HUB_OFFLINE": "1"},
            )
            try:
                is_ready = self._read_line(_START_SECONDS) == b"ready"
            except (TimeoutError, EOFError):
                is_ready = False
            if not is_ready:
                raise RuntimeError("the process that renders templates did not start")
        assert self.process is not None and self.process.stdin is not None
        request = f'{{"kind": "{kind}", "template": {json.dumps(template)}, "items": [{", ".join(texts)}]}}\n'
        self.process.stdin.write(request.encode())
        self.process.stdin.flush()
        results: list[dict[str, Any]] = []
        while len(results) < len(texts) and not (results and "limit" in results[-1]):
            try:
                results.append(json.loads(self._read_line(TIMEOUT_SECONDS)))
            except TimeoutError:
                results.append({"limit": f"takes more than {TIMEOUT_SECONDS:g} seconds"})
        return results

    def render(self, kind: str, template: str, items: Iterable[object]) -> list[dict[str, Any]]:
        """Render items with a template and return a result for each: {"text", "spans"} or {"refused"}.

        Raises UserError for a template that exceeds the limits.
        """
        results: list[dict[str, Any]] = []
        with self.lock:
            for texts in _groups(json.dumps(item) for item in items):
                if template in self.limits:
                    break
                try:
                    try:
                        answers = self._exchange(kind, template, texts)
                    except (BrokenPipeError, EOFError):  # killed from outside, for all we know
                        self.stop()
                        answers = self._exchange(kind, template, texts)
                except (BrokenPipeError, EOFError):
                    answers = [{"limit": "ended the render process"}]
                except BaseException:
                    self.stop()  # the answers that it still writes are nobody's
                    raise
                if limit := answers[-1].get("limit"):
                    self.limits[template] = limit
                    self.stop()
                results.extend(answers)
        if limit := self.limits.get(template):
            key = {"chat": "data.chat.template", "row": "data.columns"}[kind]
            which = "a template" if kind == "chat" else repr(shorten(template))
            got = f"{which} that {limit} for one {kind}"
            raise UserError(Problem(key, got, f"a template that only formats the {kind}", f"use another: {key}"))
        return results


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in groups of at most a quarter of a megabyte, or of one."""
    group: list[str] = []
    num_characters = 0
    for text in texts:
        if group and num_characters + len(text) > _MAX_GROUP_CHARACTERS:
            yield group
            group, num_characters = [], 0
        group.append(text)
        num_characters += len(text)
    if group:
        yield group


_SANDBOX = _Sandbox()
atexit.register(_SANDBOX.stop)


def render_chats(template: str, requests: Sequence[ChatRequest]) -> list[TextAndSpans]:
    """Render chats with one template. Returns (text, marked spans) for each.

    Raises jinja2.TemplateError or TypeError for a chat that the template refuses, and UserError for a
    template that exceeds the limits.
    """
    import jinja2

    if is_known_template(template):
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered = []
        for request in requests:
            try:
                [text], spans = render_jinja_template(
                    [list(request.turns)], tools=request.tools, chat_template=template, **request.options
                )
            except (ArithmeticError, LookupError, ValueError, AttributeError, RecursionError) as error:
                raise jinja2.TemplateRuntimeError(str(error)) from None
            rendered.append((str(text), [span for chat_spans in spans for span in chat_spans]))
        return rendered
    items = ({"turns": [dict(t) for t in r.turns], "tools": r.tools, "options": dict(r.options)} for r in requests)
    results = _SANDBOX.render("chat", template, items)
    for result in results:
        if "refused" in result:
            raise jinja2.TemplateRuntimeError(result["refused"])
    return [(result["text"], [(a, b) for spans in result["spans"] for a, b in spans]) for result in results]


def render_chat(
    turns: Sequence[Mapping[str, Any]], *, template: str, tools: object = None, **options: object
) -> TextAndSpans:
    """Render one chat; see `render_chats`."""
    return render_chats(template, [ChatRequest(turns, tools, options)])[0]


def render_line(template: str, fields: Mapping[str, object]) -> str:
    """Render a Jinja line of a recipe's columns with a row's fields, in the sandbox.

    Raises jinja2.TemplateError for a row that it refuses, and UserError for a line that exceeds the limits.
    """
    import jinja2

    [result] = _SANDBOX.render("row", template, [dict(fields)])
    if "refused" in result:
        raise jinja2.TemplateRuntimeError(result["refused"])
    return str(result["text"])
