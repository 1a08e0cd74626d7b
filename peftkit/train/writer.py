"""Commits checkpoints beside the training, so that steps do not wait for the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from peftkit.rundir import RunDir, is_full
from peftkit.train.snapshot import Snapshot, rotate

_SHARE = 0.1  # of the memory that is free: what a copy beside the training may take


@dataclass(frozen=True)
class Commit:
    """How the writing of a checkpoint ended. `error` is why there is none."""

    step: int
    path: str
    seconds: float
    size_bytes: int
    error: OSError | None = None


class Writer:
    """One checkpoint at a time, in order; older ones are rotated away once a newer one is read back.

    `told` hears how each ended, in the training's own thread: at the next `poll`, `submit` or `finish`.
    """

    def __init__(self, run: RunDir, told: Callable[[Commit], None]) -> None:
        self.run, self.told = run, told
        self._thread: threading.Thread | None = None
        self._commit: Commit | None = None
        self._fault: BaseException | None = None

    def submit(self, snapshot: Snapshot, *, best_step: int | None) -> None:
        """Commit a snapshot: beside what follows where its copy is small, else now."""
        self.finish()
        if snapshot.size_bytes > _SHARE * psutil.virtual_memory().available:
            self._work(snapshot, best_step)
            self.poll()
            return
        # not a daemon: a process that ends waits for what it began to write
        self._thread = threading.Thread(
            target=self._work, args=(snapshot.owned(), best_step), name="checkpoint"
        )
        self._thread.start()

    def _work(self, snapshot: Snapshot, best_step: int | None) -> None:
        started, error = time.monotonic(), None
        path = self.run.checkpoint(snapshot.step)
        try:
            snapshot.commit(self.run)
            rotate(self.run, best_step)
        except OSError as caught:
            error = caught
        except BaseException as caught:  # noqa: BLE001  raised again in the training's thread
            self._fault = caught
        seconds = time.monotonic() - started
        name = str(path.relative_to(self.run.path))
        self._commit = Commit(snapshot.step, name, seconds, snapshot.size_bytes, error)

    def poll(self) -> None:
        """Tell how the last one ended, if it has. Raises what is no matter of room on the disk."""
        if self._commit is None or (self._thread is not None and self._thread.is_alive()):
            return
        commit, fault = self._commit, self._fault
        self._thread = self._commit = self._fault = None
        if fault is not None:
            raise fault
        if commit.error is not None and not is_full(commit.error):
            raise commit.error
        self.told(commit)

    def finish(self) -> None:
        """Wait for the one that is being written, and tell."""
        if self._thread is not None:
            self._thread.join()
        self.poll()
