"""What rendering a chat template costs: in this process where it is known, in the sandbox where it is not.

python benchmarks/templates.py
"""

from __future__ import annotations

import time
from pathlib import Path

from common import median, write_result

from peftkit.data.jinja.render import _SANDBOX, ChatRequest, _trl_templates, is_known_template, render_chats

CHATS = 3_000
TURNS = 5


def main() -> int:
    known = next(template for template in sorted(_trl_templates()) if "im_start" in template)
    unknown = known + " "  # a blank more, and nobody has read it
    assert is_known_template(known) and not is_known_template(unknown)
    chat = ChatRequest(
        [
            {"role": "user", "content": "Where is the card you sent me?"},
            {"role": "assistant", "content": "It is on its way: it takes up to ten working days."},
        ]
    )
    starts = []
    for _ in range(TURNS):
        _SANDBOX.stop()
        started = time.perf_counter()
        render_chats(unknown, [chat])
        starts.append(time.perf_counter() - started)
    microseconds = {}
    for name, template, size in (
        ("known", known, 30),
        *((f"sandbox, batches of {size}", unknown, size) for size in (30, 3, 1)),
    ):
        rounds = []
        for _ in range(TURNS):
            started = time.perf_counter()
            for _ in range(CHATS // size):
                render_chats(template, [chat] * size)
            rounds.append(1e6 * (time.perf_counter() - started) / CHATS)
        microseconds[name] = median(rounds)
    print(f"first chat of the sandbox: {median(starts):.2f} s")
    for name, value in microseconds.items():
        print(f"{name:<24} {value:6.0f} us a chat")
    write_result(Path(__file__).stem, {"start_seconds": median(starts), "microseconds_per_chat": microseconds})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
