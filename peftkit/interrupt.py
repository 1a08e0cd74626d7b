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
from dataclasses import dataclass
from types import FrameType

from peftkit.errors import Interrupted

_REPEAT_SECONDS = 0.5


@dataclass
class _Signals:
    """What arrived: `requested` is what work stops for, `noted` what is to be agreed on first."""

    requested: int | None = None
    noted: int | None = None
    is_deferred: bool = False
    at_seconds: float = 0.0  # of the first, on the monotonic clock


_signals = _Signals()


def stop_requested() -> bool:
    """Return True if a signal has requested this process to stop."""
    return _signals.requested is not None


def stop_if_requested(message: str = "interrupted") -> None:
    """Raise `Interrupted` if a signal has arrived. Call it where stopping loses nothing."""
    if _signals.requested is not None:
        raise Interrupted(message, exit_code=128 + _signals.requested)


@contextmanager
def deferred() -> Iterator[None]:
    """Only note signals while the block runs: one process of several may not stop by itself.

    `request_stop` stops it, once all know.
    """
    _signals.is_deferred = True
    try:
        yield
    finally:
        if _signals.noted is not None:  # after the last time that all could have agreed on it
            request_stop(_signals.noted)
        _signals.is_deferred, _signals.noted = False, None


def noted_signal() -> int:
    """Return the number of a signal that was noted; 0 if none was."""
    return _signals.noted or 0


def request_stop(signum: int) -> None:
    """Request this process to stop, as a signal does."""
    if _signals.requested is None:
        _signals.requested = signum


def _on_signal(signum: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if not _signals.at_seconds:  # the first that this process got, though another may have been asked to stop before
        _signals.at_seconds = now
        if _signals.is_deferred:
            _signals.noted = signum
        else:
            request_stop(signum)
    elif now - _signals.at_seconds > _REPEAT_SECONDS:  # a launcher may pass on what the terminal sent already
        os._exit(128 + signum)


@contextmanager
def catch_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into the flag while the block runs, then restore the previous handlers.

    Does nothing outside the main thread, where Python allows no handlers; raises nothing there.
    """
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
        _signals.requested, _signals.at_seconds = None, 0.0
