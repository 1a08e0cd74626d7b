"""Background writer of checkpoints, so that steps do not wait for the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from peftkit.rundir import RunDir, is_disk_full
from peftkit.train.checkpoint.snapshot import TrainingSnapshot, rotate_checkpoints

_MAX_MEMORY_SHARE = 0.1  # of the memory that is free: what a copy beside the training may take


@dataclass(frozen=True)
class CommitResult:
    """The result of writing a checkpoint. `error` says why there is none."""

    step: int
    path: str
    seconds: float
    size_bytes: int
    error: OSError | None = None
    rotation_fault: str = ""  # why an older one still stands


class CheckpointWriter:
    """A writer of one checkpoint at a time, in order; older ones are removed once a newer one is verified.

    `on_commit` gets each result, in the training's own thread: at the next `poll`, `submit` or `finish`.
    """

    def __init__(self, run: RunDir, on_commit: Callable[[CommitResult], None]) -> None:
        self.run, self.on_commit = run, on_commit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future: Future[CommitResult] | None = None

    def submit(self, snapshot: TrainingSnapshot, *, best_step: int | None) -> None:
        """Commit a snapshot: in the background where its copy is small, else now."""
        self.finish()
        in_background = snapshot.size_bytes <= _MAX_MEMORY_SHARE * psutil.virtual_memory().available
        payload = snapshot.copy_to_cpu() if in_background else snapshot
        self._future = self._thread.submit(self._commit, payload, best_step)
        if not in_background:
            self.finish()

    def _commit(self, snapshot: TrainingSnapshot, best_step: int | None) -> CommitResult:
        start_time, error, rotation_fault = time.monotonic(), None, ""
        try:
            snapshot.commit(self.run)
        except OSError as os_error:
            if not is_disk_full(os_error):
                raise
            error = os_error
        else:
            try:
                rotate_checkpoints(self.run, best_step)
            except OSError as rotation_error:
                rotation_fault = str(rotation_error)
        name = str(self.run.checkpoint(snapshot.step).relative_to(self.run.path))
        return CommitResult(
            snapshot.step, name, time.monotonic() - start_time, snapshot.size_bytes, error, rotation_fault
        )

    def poll(self) -> None:
        """Report the last commit if it has ended. Raises errors other than a full disk."""
        if self._future is not None and self._future.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the commit in progress, and report it."""
        if self._future is not None:
            future, self._future = self._future, None
            self.on_commit(future.result())

    def close(self) -> None:
        """Finish the commit in progress and stop the thread."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()
