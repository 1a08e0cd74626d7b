"""Paths and files of one run, its event log, and its trusted checkpoints."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.rundir.events import Event, read_event
from peftkit.rundir.files import TEMPORARY_PREFIX, is_leftover, remove_leftovers, verify_folder, write_text
from peftkit.rundir.lock import LOCK
from peftkit.secrets import redact_value

_PLANNING_FILES = ("plan.json", "environment.json", "data.json", "resolved.yaml", "recipe.yaml")
_CHECKPOINT = re.compile(r"^step-(\d{6,})$")


def step_of(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint's folder; 0 for None, the start."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


@dataclass(frozen=True)
class RunDir:
    """Paths and files of one run: where things are, not what they mean.

    `is_read_only` for a process that trains along and leaves the writing to another.
    """

    path: Path
    is_read_only: bool = False

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    def checkpoint(self, step: int) -> Path:
        """Return the path of a step's checkpoint, whether it exists or not."""
        return self.checkpoints / f"step-{step:06d}"

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Create a run directory. Raises UserError if it cannot be made or would be overwritten."""
        _check_path_name(path, "choose another --out")
        if path.exists() and not path.is_dir():
            raise UserError(Problem(str(path), "a file", "a folder for the run", "choose another --out"))
        if path.is_dir() and any(not (entry.name == LOCK or is_leftover(entry.name)) for entry in path.iterdir()):
            is_run = (path / "resolved.yaml").exists()
            got = "a folder that already holds a run" if is_run else "a folder that is not empty"
            is_finished = is_run and (path / "adapter").exists() | (path / "model").exists()
            fix = f"continue it: peftkit resume {path}, or " if is_run and not is_finished else ""
            got += " that has finished" if is_finished else ""
            raise UserError(Problem(str(path), got, "a new or empty folder", f"{fix}choose another --out"))
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f"{TEMPORARY_PREFIX}writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                Problem(
                    str(path), f"no permission to write ({error.strerror})", "a writable folder", "choose another --out"
                )
            ) from None
        return cls(path)

    def discard(self, *, keep_folder: bool) -> None:
        """Remove a run in which nothing was trained: our files, and the folder if we made it."""
        self.remove_leftovers()
        for name in (*_PLANNING_FILES, LOCK):
            (self.path / name).unlink(missing_ok=True)
        if not keep_folder:
            with suppress(OSError):  # what others put there stays
                self.path.rmdir()

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Open an existing run. Raises UserError if `path` holds none."""
        _check_path_name(path, "give the folder of a run")
        if not (path / "resolved.yaml").is_file():
            got = "a folder without resolved.yaml" if path.is_dir() else "nothing there"
            fix = ""
            if path.suffix in {".yaml", ".yml"}:
                got, fix = "a recipe", f"train it first: peftkit finetune {path}; then give the folder that it names"
            elif inside := [file.parent for file in path.glob("checkpoint-*/adapter_config.json")]:
                last = max(inside, key=lambda folder: (len(folder.name), folder.name))
                got, fix = "a trainer's folder of checkpoints", f"give one of them, the last is {last}"
            raise UserError(Problem(str(path), got, "a run directory made by peftkit finetune", fix))
        if (path / "checkpoints").is_symlink():
            got = "a checkpoints folder that is a symlink"
            raise UserError(Problem(str(path), got, "a folder of the run itself", "move the checkpoints here"))
        return cls(path)

    def emit(self, event: Event) -> Event:
        """Append one event, whole or not at all. Returns the event as written, without secrets."""
        record = dict(redact_value(event.to_json()))
        if self.is_read_only:
            return read_event(record)
        line = (json.dumps(record, ensure_ascii=False, allow_nan=True) + "\n").encode(
            "utf-8",
            "backslashreplace",  # a lone surrogate becomes JSON's own escape
        )
        handle = os.open(self.events_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size_before = os.fstat(handle).st_size
            try:
                if os.write(handle, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.events_file))
            except OSError:
                os.ftruncate(handle, size_before)
                raise
        finally:
            os.close(handle)
        return read_event(record)

    def events(self) -> list[Event]:
        """Return all events in order, without a cut last line. Raises UserError for a broken line."""
        numbered_events = list(self._numbered_events())
        broken_lines = [number for number, event in numbered_events if event is None]
        if broken_lines:
            where, fix = f"{self.events_file}:{broken_lines[0]}", "peftkit resume moves broken lines to a backup"
            raise UserError(Problem(where, "a line that is no event", "events as peftkit wrote them", fix))
        return [read_event(record) for _, record in numbered_events if record is not None]

    def _numbered_events(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Yield (line number, event, or None for a broken line); an unfinished last line is left out."""
        if not self.events_file.exists():
            return
        # not splitlines(): JSON may hold other line separators, such as U+0085, as they are
        *lines, _cut = self.events_file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            yield number, event if isinstance(event, dict) and "event" in event else None

    def repair_events(self) -> list[int]:
        """Drop a last line that a kill cut short. Back up broken lines and return their numbers."""
        numbered_events = list(self._numbered_events())
        broken_lines = [number for number, event in numbered_events if event is None]
        if broken_lines:
            backup_folder = tempfile.mkdtemp(dir=self.path, prefix="damaged-events-")
            (Path(backup_folder) / self.events_file.name).write_bytes(self.events_file.read_bytes())
        if broken_lines or (self.events_file.exists() and not self.events_file.read_bytes().endswith(b"\n")):
            raw_lines = self.events_file.read_bytes().split(b"\n")
            lines = [raw_lines[number - 1].decode("utf-8") for number, event in numbered_events if event is not None]
            write_text(self.events_file, "".join(f"{line}\n" for line in lines))
        return broken_lines

    def checkpoint_steps(self) -> list[int]:
        """Return the steps that have a checkpoint folder (verified or not), ascending."""
        if not self.checkpoints.is_dir():
            return []
        matches = (_CHECKPOINT.match(path.name) for path in self.checkpoints.iterdir() if not path.is_symlink())
        return sorted(int(match[1]) for match in matches if match)

    def remove_leftovers(self) -> None:
        """Remove the leftovers of interrupted writes. Only for the run's owner."""
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)

    def set_aside_damaged(self) -> None:
        """Rename checkpoints that do not verify, so that they are neither trusted nor in the way."""
        for step in self.checkpoint_steps():
            if verify_folder(self.checkpoint(step)):
                self.set_aside(step, "damaged")

    def set_aside(self, step: int, why: str) -> None:
        """Rename a checkpoint, so that no run continues from it; it is kept."""
        folder = self.checkpoint(step)
        folder.replace(tempfile.mkdtemp(dir=self.checkpoints, prefix=f"{why}-{folder.name}-"))

    def newest_checkpoint(self, *, below: float = math.inf) -> tuple[Path | None, list[str]]:
        """Return the newest verified checkpoint of a step `below`, and the faults of newer ones."""
        skipped_faults: list[str] = []
        for step in reversed([step for step in self.checkpoint_steps() if step < below]):
            faults = verify_folder(self.checkpoint(step))
            if not faults:
                return self.checkpoint(step), skipped_faults
            skipped_faults.extend(faults)
        return None, skipped_faults


def _check_path_name(path: Path, fix: str) -> None:
    """Raise UserError for a path that no file can have."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        where = str(path)[:80].replace("\0", "\\0")
        raise UserError(Problem(where, f"a name that no folder can have ({cause})", "a path", fix)) from None
