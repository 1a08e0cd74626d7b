"""Ctrl-C and SIGTERM as a flag that long work polls at its safe points.

The first signal requests a stop: the work finishes its step, commits, and raises `Interrupted`. A second
signal exits at once, unless it comes within half a second of the first.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from peftkit.errors import Interrupted

_received: int | None = None
_received_at_seconds = 0.0  # when, on the monotonic clock
_REPEAT_SECONDS = 0.5


def stop_requested() -> bool:
    """Return True if a signal has requested this process to stop."""
    return _received is not None


def stop_if_requested(message: str = "interrupted") -> None:
    """Raise `Interrupted` if a signal has arrived. Call it where stopping loses nothing."""
    if _received is not None:
        raise Interrupted(message, exit_code=128 + _received)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    global _received, _received_at_seconds
    now = time.monotonic()
    if _received is None:
        _received, _received_at_seconds = signum, now
    elif now - _received_at_seconds > _REPEAT_SECONDS:  # a launcher may pass on what the terminal sent already
        os._exit(128 + signum)


@contextmanager
def catch_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into the flag while the block runs, then restore the previous handlers.

    Does nothing outside the main thread, where Python allows no handlers; raises nothing there.
    """
    global _received  # noqa: PLW0603
    try:
        previous_handlers = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a notebook's worker): the caller's own handling stays
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        _received = None
