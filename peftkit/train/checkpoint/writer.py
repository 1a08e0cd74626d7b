"""Commits checkpoints beside the training, so that steps do not wait for the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from peftkit.rundir import RunDir, is_full
from peftkit.train.checkpoint.snapshot import Snapshot, rotate

_SHARE = 0.1  # of the memory that is free: what a copy beside the training may take


@dataclass(frozen=True)
class Commit:
    """How the writing of a checkpoint ended. `error` is why there is none."""

    step: int
    path: str
    seconds: float
    size_bytes: int
    error: OSError | None = None
    rotation_fault: str = ""  # why an older one still stands


class Writer:
    """One checkpoint at a time, in order; older ones are rotated away once a newer one is read back.

    `told` hears how each ended, in the training's own thread: at the next `poll`, `submit` or `finish`.
    """

    def __init__(self, run: RunDir, told: Callable[[Commit], None]) -> None:
        self.run, self.told = run, told
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Commit] | None = None

    def submit(self, snapshot: Snapshot, *, best_step: int | None) -> None:
        """Commit a snapshot: beside what follows where its copy is small, else now."""
        self.finish()
        beside = snapshot.size_bytes <= _SHARE * psutil.virtual_memory().available
        kept = snapshot.owned() if beside else snapshot
        self._writing = self._thread.submit(self._commit, kept, best_step)
        if not beside:
            self.finish()

    def _commit(self, snapshot: Snapshot, best_step: int | None) -> Commit:
        started, error, fault = time.monotonic(), None, ""
        try:
            snapshot.commit(self.run)
        except OSError as caught:
            if not is_full(caught):
                raise
            error = caught
        else:
            fault = self._rotated(best_step)
        name = str(self.run.checkpoint(snapshot.step).relative_to(self.run.path))
        return Commit(snapshot.step, name, time.monotonic() - started, snapshot.size_bytes, error, fault)

    def _rotated(self, best_step: int | None) -> str:
        """Remove older ones; what kept one from going loses nothing, and is told."""
        try:
            rotate(self.run, best_step)
        except OSError as error:
            return str(error)
        return ""

    def poll(self) -> None:
        """Tell how the last one ended, if it has. Raises what is no matter of room on the disk."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the one that is being written, and tell."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.told(writing.result())

    def close(self) -> None:
        """The same, and no more will come."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()
