"""Chats by a chat template, through transformers: here where that is safe, else in a process with limits.

A template comes with a model, from whoever made it. Those that are plain (`data/chat/bounded`), and those
that are known word for word, are rendered at once. Any other costs a round trip to a process that may take
10 seconds a chat and a gigabyte, and do nothing else.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError

SECONDS = 10.0  # for one chat: those in use take a thousandth of one
_START_SECONDS = 120.0
_PROGRAM = Path(__file__).with_name("sandbox.py")
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV")
Rendering = tuple[str, list[tuple[int, int]]]


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    """The templates that TRL ships: read and maintained there, and so not hostile."""
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path("trl")
    return frozenset(path.read_text(encoding="utf-8") for path in folder.glob("*.jinja"))


def is_safe(template: str) -> bool:
    """Whether a template may be rendered in this process."""
    from peftkit.data.chat.bounded import why_not_plain

    return not why_not_plain(template) or template in _known()


class _Renderer:
    """The process, started when it is first needed; one for each process that needs it."""

    def __init__(self) -> None:
        self.owner = 0
        self.child: subprocess.Popen[bytes] | None = None
        self.rest = b""
        self.lock = threading.Lock()
        self.limits: dict[str, str] = {}  # of templates that went beyond them: never tried again

    def stop(self) -> None:
        """End the process, if it is ours."""
        if self.child is not None and self.owner == os.getpid():
            self.child.kill()
            self.child.communicate()
        self.child = None

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        self.owner, self.rest = os.getpid(), b""
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us: it would be taken for a bad template
            env={**environment, "HF_HUB_OFFLINE": "1"},
        )
        if self._line(_START_SECONDS) != b"ready":
            self.stop()
            raise RuntimeError("the process that renders chat templates did not start")

    def _line(self, seconds: float) -> bytes | None:
        """The next line of the process; None where it does not come in time, or the process ends."""
        assert self.child is not None and self.child.stdout is not None
        until, pieces = time.monotonic() + seconds, [self.rest]
        while b"\n" not in pieces[-1]:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.child.stdout], [], [], left)[0]:
                return None
            piece = os.read(self.child.stdout.fileno(), 2**20)
            if not piece:
                return None
            pieces.append(piece)
        line, _, self.rest = b"".join(pieces).partition(b"\n")
        return line

    def ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What the process answers; under `limit`, what the template went beyond."""
        template = str(asked["template"])
        with self.lock:
            if template in self.limits:
                return {"limit": self.limits[template]}
            if self.child is None or self.owner != os.getpid() or self.child.poll() is not None:
                self._start()  # also where somebody ended it between two chats
            assert self.child is not None and self.child.stdin is not None
            self.child.stdin.write(json.dumps(asked).encode() + b"\n")
            self.child.stdin.flush()
            line = self._line(SECONDS)
            if line is None:
                ended = self.child.poll() is not None
                self.stop()
                said: dict[str, Any] = {"limit": "ended" if ended else f"takes more than {SECONDS:g} seconds"}
            else:
                said = json.loads(line)
            if "limit" in said:
                self.limits[template] = said["limit"]
            return said


_RENDERER = _Renderer()
atexit.register(_RENDERER.stop)


def render_chat(
    turns: Sequence[Mapping[str, Any]], *, template: str, tools: Any = None, **options: Any
) -> Rendering:
    """(text, marked spans) of a chat; `options` are transformers' and the special tokens.

    Raises jinja2.TemplateError or TypeError for a chat that the template refuses, and UserError for a
    template that goes beyond the limits.
    """
    import jinja2

    from peftkit.data.chat.bounded import why_not_plain

    if is_safe(template):
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            [text], spans = render_jinja_template(
                [list(turns)], tools=tools, chat_template=template, **options
            )
        except (ArithmeticError, LookupError, ValueError, AttributeError, RecursionError) as error:
            raise jinja2.TemplateRuntimeError(str(error)) from None
        return str(text), [span for of_one in spans for span in of_one]
    turns = [dict(turn) for turn in turns]
    said = _RENDERER.ask({"turns": turns, "tools": tools, "template": template, "options": options})
    if "limit" in said:
        got = f"a template that {said['limit']} for one chat (it has {why_not_plain(template)})"
        fix = "use another template: data.chat.template"
        raise UserError(Problem("chat template", got, "a template that only writes the chat", fix))
    if "refused" in said:
        raise jinja2.TemplateRuntimeError(said["refused"])
    return said["text"], [(start, end) for of_one in said["spans"] for start, end in of_one]
