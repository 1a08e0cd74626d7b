"""A process that renders chats by templates that may be hostile: with little memory, and no way to do harm.

A program of its own, which peftkit.data.chat.render starts and watches; it is never imported. Even a template
that leaves Jinja's sandbox may start no program here, open no socket, and write no file.

    python -P renderer.py    answers each line of JSON on stdin with a line of JSON on stdout
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_ROOM_BYTES = 2**30
_LONGEST = 2**26  # characters of a chat as text
_FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "urllib.")
_ALLOWED = {"os.listdir", "os.scandir"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: what no template needs ends its rendering. It cannot be taken off again."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(flags, int) and flags & _WRITES
        ):
            raise PermissionError("it tries to write a file")
    elif event.startswith(_FORBIDDEN) and event not in _ALLOWED:
        raise PermissionError(f"it tries {event}")


def _cap_memory() -> None:
    """At most so much address space beyond what this process takes now, where Linux tells that."""
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            limit = int(file.read().split()[0]) * resource.getpagesize() + _ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def answer(line: str) -> dict[str, Any]:
    """One chat as text with its marked spans, or why there is none."""
    try:
        asked = json.loads(line)
        [text], spans = render_jinja_template(
            [asked["turns"]], tools=asked["tools"], chat_template=asked["template"], **asked["options"]
        )
        if len(text) > _LONGEST:
            return {"limit": f"makes a chat of {len(text):,} characters"}
        return {"text": str(text), "spans": spans}
    except MemoryError:
        return {"limit": "takes more than a gigabyte of memory"}
    except BaseException as error:  # noqa: BLE001  a hostile template may raise anything: told, whatever it is
        return {"refused": f"{error or type(error).__name__}"[:500]}


def main() -> None:
    """Say that all is imported, then answer until the other side closes."""
    sys.dont_write_bytecode = True
    render_jinja_template([[{"role": "user", "content": "hi"}]], chat_template="{{ messages[0]['content'] }}")
    _cap_memory()
    sys.addaudithook(_guard)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line)), flush=True)


if __name__ == "__main__":
    main()
