"""The run directory: everything that a run leaves behind, complete or absent.

A folder that matters (a checkpoint, an adapter, a converted base) is written to a temporary sibling,
its manifest of sizes and sha256 last, everything fsynced, and only then renamed into place. What has no
valid manifest is never trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError

MANIFEST = "MANIFEST.json"
_CHECKPOINT = re.compile(r"^step-(\d{6,})$")


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def publish_folder(final: Path, **facts: Any) -> Iterator[Path]:
    """Yield a temporary sibling to write into; on success it becomes `final`, with a manifest.

    `facts` are stored in the manifest beside the files' sizes and hashes. An exception, or a kill at any
    moment, leaves no `final`; an exception also removes the temporary folder.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".tmp-{final.name}-"))
    try:
        yield staging
        staging.chmod(0o755)
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        entries = {}
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            entries[str(path.relative_to(staging))] = {
                "size_bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
        write_json(staging / MANIFEST, {**facts, "files": entries})
        staging.rename(final)
        _fsync_folder(final.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def verify_folder(folder: Path, *, hashes: bool = True) -> list[str]:
    """What is wrong with a published folder, in words; empty when every file is as it was written.

    `hashes=False` compares sizes only: enough to know that a write was finished, at no cost.
    """
    try:
        entries = read_json(folder / MANIFEST)["files"]
    except FileNotFoundError:
        return [f"{folder.name} is incomplete (no {MANIFEST})"]
    except (ValueError, KeyError, TypeError):
        return [f"{folder.name} has an unreadable {MANIFEST}"]
    faults = []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{folder.name}/{name} is missing")
        elif path.stat().st_size != entry["size_bytes"]:
            faults.append(f"{folder.name}/{name} has {path.stat().st_size} bytes, not {entry['size_bytes']}")
        elif hashes and sha256_of(path) != entry["sha256"]:
            faults.append(f"{folder.name}/{name} was changed after it was written (sha256 differs)")
    return faults


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
        if path.exists() and not path.is_dir():
            raise UserError(Problem(str(path), "a file", "a folder for the run", "choose another --out"))
        if path.is_dir() and any(path.iterdir()):
            is_run = (path / "plan.json").exists()
            got = "a folder that already holds a run" if is_run else "a folder that is not empty"
            fix = f"go on with it: peftkit resume {path}, or " if is_run else ""
            raise UserError(Problem(str(path), got, "a new or empty folder", f"{fix}choose another --out"))
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
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

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run. Raises UserError where `path` holds none."""
        if not (path / "plan.json").is_file():
            got = "a folder without plan.json" if path.is_dir() else "nothing there"
            raise UserError(Problem(str(path), got, "a run directory made by peftkit finetune"))
        return cls(path)

    def emit(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append one event and flush it. Returns what was written."""
        record = {"event": event, **fields}
        line = json.dumps(record, ensure_ascii=False, allow_nan=True) + "\n"
        with self.events_file.open("a", encoding="utf-8") as file:
            file.write(line)
        return record

    def events(self) -> list[dict[str, Any]]:
        """All events in order. A last line cut by a kill is left out, a broken line elsewhere raises."""
        if not self.events_file.exists():
            return []
        # not splitlines(): JSON may hold other line separators, such as U+0085, as they are
        *lines, _cut = self.events_file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines]

    def drop_cut_event(self) -> None:
        """Remove a last line that a kill cut short, so that the next event starts a line of its own."""
        if self.events_file.exists():
            text = self.events_file.read_text(encoding="utf-8", errors="replace")
            if text and not text.endswith("\n"):
                write_text(self.events_file, text[: text.rfind("\n") + 1])

    def checkpoint_steps(self) -> list[int]:
        """Steps of which a checkpoint folder stands (verified or not), ascending."""
        if not self.checkpoints.is_dir():
            return []
        found = (_CHECKPOINT.match(path.name) for path in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def set_damaged_aside(self) -> None:
        """Rename checkpoints that do not verify, so that they are neither trusted nor in the way."""
        for step in self.checkpoint_steps():
            folder = self.checkpoint(step)
            if verify_folder(folder):
                aside = tempfile.mkdtemp(dir=self.checkpoints, prefix=f"damaged-{folder.name}-")
                folder.replace(aside)

    def newest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and why newer ones were passed over."""
        skipped: list[str] = []
        for step in reversed(self.checkpoint_steps()):
            faults = verify_folder(self.checkpoint(step))
            if not faults:
                return self.checkpoint(step), skipped
            skipped.extend(faults)
        return None, skipped
