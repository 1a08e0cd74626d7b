"""Sandbox process that renders templates that may be hostile: little memory, no side effects.

A program of its own, which `render.py` starts and watches; it is never imported. Even a template that
leaves Jinja's sandbox may start no program here, open no socket, and write no file.

    python -P sandbox.py    answers each line of JSON on stdin with a line of JSON for each of its items
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

_MAX_EXTRA_BYTES = 2**30
_MAX_CPU_SECONDS = 30
_OUT_OF_MEMORY = "takes more than a gigabyte of memory"
_MAX_CHARACTERS = 2**26  # characters of a rendered text
_FORBIDDEN_EVENTS = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "urllib.")
_ALLOWED_EVENTS = {"os.listdir", "os.scandir"}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def deny_side_effects(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: raise PermissionError for events that no template needs. It cannot be removed again."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITE_FLAGS):
            raise PermissionError("it tries to write a file")
    elif event.startswith(_FORBIDDEN_EVENTS) and event not in _ALLOWED_EVENTS:
        raise PermissionError(f"it tries {event}")


def finalize(value: object) -> Any:
    """Return the value of a line's expression. Raises TemplateRuntimeError for anything but text and numbers."""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, jinja2.Undefined):
        return str(value)  # raises, with the name
    raise jinja2.TemplateRuntimeError(f"{'nothing' if value is None else type(value).__name__} in it")


@lru_cache(maxsize=64)
def compile_line(text: str) -> jinja2.Template:
    """Compile a Jinja line of a recipe's columns: a recipe is data, not code."""
    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=finalize).from_string(text)


def render_item(kind: str, template: str, item: dict[str, Any]) -> dict[str, Any]:
    """Render a chat or a row. Returns its text and marked spans, or why it was refused, or the limit."""
    try:
        if kind == "row":
            text, spans = compile_line(template).render(item), []
        else:
            [text], spans = render_jinja_template(
                [item["turns"]], tools=item["tools"], chat_template=template, **item["options"]
            )
        if len(text) > _MAX_CHARACTERS:
            return {"limit": f"makes a text of {len(text):,} characters"}
        return {"text": str(text), "spans": spans}
    except MemoryError:
        return {"limit": _OUT_OF_MEMORY}
    except BaseException as error:  # noqa: BLE001  a hostile template may raise anything: told, whatever it is
        return {"refused": f"{error or type(error).__name__}"[:500]}


def main() -> None:
    """Report readiness once all is imported, then answer requests until stdin closes."""
    sys.dont_write_bytecode = True
    render_jinja_template([[{"role": "user", "content": "hi"}]], chat_template="{{ messages[0]['content'] }}")
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            limit = int(file.read().split()[0]) * resource.getpagesize() + _MAX_EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.addaudithook(deny_side_effects)
    print("ready", flush=True)
    try:
        for line in sys.stdin:
            request = json.loads(line)
            for item in request["items"]:
                # the parent may be gone, and unable to kill a render that never ends
                soft, hard = int(time.process_time()) + _MAX_CPU_SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]
                resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))
                print(json.dumps(render_item(request["kind"], request["template"], item)), flush=True)
    except MemoryError:
        print(json.dumps({"limit": _OUT_OF_MEMORY}), flush=True)


if __name__ == "__main__":
    main()
