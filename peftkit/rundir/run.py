"""Paths and files of one run, its event log, and which of its checkpoints can be trusted."""

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
from peftkit.rundir.files import TEMPORARY, is_ours, sweep, verify_folder, write_text
from peftkit.rundir.lock import LOCK
from peftkit.secrets import redact_value

_DECIDED = ("plan.json", "environment.json", "data.json", "resolved.yaml", "recipe.yaml")
_CHECKPOINT = re.compile(r"^step-(\d{6,})$")


def step_of(checkpoint: Path | None) -> int:
    """The step of a checkpoint's folder; 0, the start, where there is none."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


@dataclass(frozen=True)
class RunDir:
    """Paths and files of one run. Knows where things are, not what they mean."""

    path: Path

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
        """Where the checkpoint of a step stands, whether it exists or not."""
        return self.checkpoints / f"step-{step:06d}"

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Make a fresh run directory. Raises UserError where one cannot be made or would be overwritten."""
        _check_name(path, "choose another --out")
        if path.exists() and not path.is_dir():
            raise UserError(Problem(str(path), "a file", "a folder for the run", "choose another --out"))
        if path.is_dir() and any(not _left_by_a_kill(one) for one in path.iterdir()):
            is_run = (path / "resolved.yaml").exists()
            got = "a folder that already holds a run" if is_run else "a folder that is not empty"
            fix = f"go on with it: peftkit resume {path}, or " if is_run else ""
            raise UserError(Problem(str(path), got, "a new or empty folder", f"{fix}choose another --out"))
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f"{TEMPORARY}writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                Problem(
                    str(path),
                    f"no permission to write ({error.strerror})",
                    "a writable folder",
                    "choose another --out",
                )
            ) from None
        return cls(path)

    def discard(self, *, keep_folder: bool) -> None:
        """Remove a run in which nothing was trained: the files that are ours, and a folder that we made."""
        self.sweep()
        for name in (*_DECIDED, LOCK):
            (self.path / name).unlink(missing_ok=True)
        if not keep_folder:
            with suppress(OSError):  # what others put there stays
                self.path.rmdir()

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run. Raises UserError where `path` holds none."""
        _check_name(path, "give the folder of a run")
        if not (path / "resolved.yaml").is_file():
            got = "a folder without resolved.yaml" if path.is_dir() else "nothing there"
            raise UserError(Problem(str(path), got, "a run directory made by peftkit finetune"))
        if (path / "checkpoints").is_symlink():
            got = "checkpoints that are a link to elsewhere"
            raise UserError(
                Problem(str(path), got, "a folder of the run itself", "move the checkpoints here")
            )
        return cls(path)

    def emit(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append one event, whole or not at all. Returns what was written."""
        record = dict(redact_value({"event": event, **fields}))
        line = (json.dumps(record, ensure_ascii=False, allow_nan=True) + "\n").encode(
            "utf-8",
            "backslashreplace",  # a lone surrogate becomes JSON's own escape
        )
        handle = os.open(self.events_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(handle).st_size
            try:
                if os.write(handle, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.events_file))
            except OSError:
                os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
        return record

    def events(self) -> list[dict[str, Any]]:
        """All events in order. A last line cut by a kill is left out. Raises UserError for a broken line."""
        found = list(self._lines())
        broken = [number for number, event in found if event is None]
        if broken:
            where, fix = f"{self.events_file}:{broken[0]}", "peftkit resume sets broken lines aside"
            raise UserError(Problem(where, "a line that is no event", "events as peftkit wrote them", fix))
        return [event for _, event in found if event is not None]

    def _lines(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """(line, its event, None where it is none); what follows the last line end is a cut event."""
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

    def mend_events(self) -> list[int]:
        """Drop a last line that a kill cut short. Broken lines are set aside, and their numbers returned."""
        found = list(self._lines())
        broken = [number for number, event in found if event is None]
        if broken:
            aside = tempfile.mkdtemp(dir=self.path, prefix="damaged-events-")
            (Path(aside) / self.events_file.name).write_bytes(self.events_file.read_bytes())
        if broken or (self.events_file.exists() and not self.events_file.read_bytes().endswith(b"\n")):
            kept = self.events_file.read_bytes().split(b"\n")
            lines = [kept[number - 1].decode("utf-8") for number, event in found if event is not None]
            write_text(self.events_file, "".join(f"{line}\n" for line in lines))
        return broken

    def checkpoint_steps(self) -> list[int]:
        """Steps of which a checkpoint folder stands (verified or not), ascending."""
        if not self.checkpoints.is_dir():
            return []
        found = (_CHECKPOINT.match(path.name) for path in self.checkpoints.iterdir() if not path.is_symlink())
        return sorted(int(match[1]) for match in found if match)

    def sweep(self) -> None:
        """Remove what writes that a kill cut short left behind. Only for the run's owner."""
        for folder in (self.path, self.checkpoints):
            sweep(folder)

    def set_damaged_aside(self) -> None:
        """Rename checkpoints that do not verify, so that they are neither trusted nor in the way."""
        for step in self.checkpoint_steps():
            if verify_folder(self.checkpoint(step)):
                self.set_aside(step, "damaged")

    def set_aside(self, step: int, why: str) -> None:
        """Rename a checkpoint, so that nothing goes on from it; it is kept."""
        folder = self.checkpoint(step)
        folder.replace(tempfile.mkdtemp(dir=self.checkpoints, prefix=f"{why}-{folder.name}-"))

    def newest_checkpoint(self, *, below: float = math.inf) -> tuple[Path | None, list[str]]:
        """The newest checkpoint of a step `below` that verifies, and why newer ones were passed over."""
        skipped: list[str] = []
        for step in reversed([step for step in self.checkpoint_steps() if step < below]):
            faults = verify_folder(self.checkpoint(step))
            if not faults:
                return self.checkpoint(step), skipped
            skipped.extend(faults)
        return None, skipped


def _left_by_a_kill(path: Path) -> bool:
    """Whether a file is all that a process killed in its first moments leaves: then there is no run yet."""
    return path.name == LOCK or is_ours(path.name)


def _check_name(path: Path, fix: str) -> None:
    """Raises UserError for what no file can be called."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        where = str(path)[:80].replace("\0", "\\0")
        raise UserError(Problem(where, f"a name that no folder can have ({said})", "a path", fix)) from None
