"""What is done to runs, and what must be true of them afterwards. Used by the tests and by the benchmark.

Each scene returns None where all held, or in words what did not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peftkit
from peftkit.errors import UserError
from peftkit.rundir import RunDir, verify_folder
from tests.conftest import TINY_LLAMA, chat, write_jsonl
from tests.rigs.chaos.nursery import Nursery

STEPS = 12


def recipe_at(place: Path, **train: Any) -> dict[str, Any]:
    """LoRA with dropout, accumulation, evaluation and warm-up: 12 steps over two epochs and a half."""
    words = ("alpha", "beta", "gamma", "delta")
    rows = [chat(f"Say {words[i % 4]} number {i}", f"{words[i % 4]} {words[i % 4]}") for i in range(24)]
    settings = {
        "max_steps": STEPS,
        "batch_size": 4,
        "micro_batch": 2,
        "max_length": 64,
        "eval_steps": 4,
        "checkpoint_steps": 3,
        "learning_rate": 1e-3,
    }
    return {
        "base": str(TINY_LLAMA),
        "method": {"name": "lora", "rank": 4, "dropout": 0.1},
        "data": {"train": str(write_jsonl(place / "rows.jsonl", rows)), "eval": "25%"},
        "train": {**settings, **train},
    }


def result_bytes(run: Path) -> bytes:
    """The adapter's weights."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@dataclass
class Scenes:
    """A recipe, the run that nothing hurt, and a nursery for those that are."""

    nursery: Nursery
    place: Path
    recipe: dict[str, Any]
    wanted: bytes = b""
    num_points: int = 0
    seconds: float = 0.0

    @classmethod
    def at(cls, place: Path, nursery: Nursery, recipe: dict[str, Any] | None = None) -> Scenes:
        """With the whole run made, twice: the second one has the caches that the victims will have."""
        found = cls(nursery, place, recipe or recipe_at(place))
        for name in ("first", "whole"):
            answer = found.order("finetune", place / name)
            assert answer["status"] == 0, answer["log"]
        found.wanted, found.num_points = result_bytes(place / "whole"), answer["points"]
        found.seconds = answer["seconds"]
        assert result_bytes(place / "first") == found.wanted
        return found

    def order(self, do: str, out: Path, **hurt: Any) -> dict[str, Any]:
        """Have a victim work on `out`."""
        cache = hurt.pop("cache", self.place / "cache")
        return self.nursery.order(do=do, recipe=self.recipe, out=out, cache=cache, hurt=hurt)

    def gone_on_with(self, out: Path) -> str | None:
        """Resume a run that was hurt, or begin it where it had not begun; it must end as the whole run."""
        begun = (out / "resolved.yaml").exists()
        ended = (out / "adapter").exists()
        before = RunDir(out).newest_checkpoint()[0] if begun and not ended else None
        answer = self.order("resume" if begun else "finetune", out)
        if answer["status"] != 0 and not ("a finished run" in answer["log"] and answer["status"] == 2):
            return f"going on ended with {answer['status']}: {answer['log'][-500:]}"
        if "Traceback" in answer["log"]:
            return f"a traceback: {answer['log'][-800:]}"
        if before is not None and f'"step": {int(before.name[5:])}' not in answer["log"]:
            return f"did not go on from {before.name}"
        return self.ended_well(out)

    def ended_well(self, out: Path) -> str | None:
        """The result equals the whole run's, everything verifies, no partial files are left."""
        if result_bytes(out) != self.wanted:
            return "another adapter than the whole run's"
        if faults := peftkit.verify_run(out).faults:
            return "; ".join(faults)
        left = [str(path.relative_to(out)) for path in out.rglob(".tmp-*")]
        if left:
            return f"left behind: {', '.join(left)}"
        if peftkit.summarize_run(out).result is None:
            return "a finished run and does not say so"
        shutil.rmtree(out)
        return None

    def killed_at(self, point: int) -> str | None:
        """SIGKILL at a write point."""
        out = self.place / f"kill-{point}"
        answer = self.order("finetune", out, how="kill", at=point)
        if answer["status"] not in {-9, 0}:
            return f"ended with {answer['status']}: {answer['log'][-500:]}"
        return self.gone_on_with(out)

    def killed_after(self, seconds: float, **more: Any) -> str | None:
        """SIGKILL at a moment."""
        out = self.place / f"kill-{round(seconds * 1e6)}us"
        answer = self.order("finetune", out, how="SIGKILL", after_seconds=seconds, **more)
        if answer["status"] not in {-9, 0}:
            return f"ended with {answer['status']}: {answer['log'][-500:]}"
        return self.gone_on_with(out)

    def terminated(self, event: str, how: str = "SIGTERM", step: int = 0) -> str | None:
        """A signal at an event: the right exit code, within ten seconds, and a command to go on."""
        out = self.place / f"{how}-{event.replace(' ', '-')}-{step}"
        answer = self.order("finetune", out, how=how, on=event, step=step)
        code = {"SIGTERM": 143, "SIGINT": 130}[how]
        late = event in {"done", "phase publish", "memory"}  # nothing is left to stop
        if answer["status"] != (0 if late else code):
            return f"ended with {answer['status']}, not {code}: {answer['log'][-500:]}"
        if not late and f"peftkit resume {out}" not in answer["log"]:
            return "does not say how to go on"
        if answer["seconds"] > self.seconds + 10:
            return f"took {answer['seconds']:.1f} s"
        return self.gone_on_with(out)

    def without_room(self, how: str, point: int, until: int) -> str | None:
        """No room from one write point to another: it goes on, or ends cleanly with all that stands whole."""
        out = self.place / f"{how}-{point}-{until}"
        answer = self.order("finetune", out, how=how, at=point, until=until)
        if answer["status"] not in {0, 2} or "Traceback" in answer["log"]:
            return f"ended with {answer['status']}: {answer['log'][-1500:]}"
        return self._whole_so_far(out) or self.gone_on_with(out)

    def with_small_files(self, num_bytes: int) -> str | None:
        """RLIMIT_FSIZE: no file may grow beyond a size."""
        out = self.place / f"small-{num_bytes}"
        answer = self.order("finetune", out, how="none", file_size=num_bytes)
        if answer["status"] not in {0, 2} or "Traceback" in answer["log"]:
            return f"ended with {answer['status']}: {answer['log'][-1500:]}"
        return self._whole_so_far(out) or self.gone_on_with(out)

    def _whole_so_far(self, out: Path) -> str | None:
        """Every checkpoint that stands is whole."""
        run = RunDir(out)
        faults = [fault for step in run.checkpoint_steps() for fault in verify_folder(run.checkpoint(step))]
        return "; ".join(faults) or None

    def stopped_run(self) -> Path:
        """A run stopped at step 8, with at least two checkpoints: to be damaged in copies of it."""
        out = self.place / "stopped"
        answer = self.order("finetune", out, how="SIGTERM", on="step", step=8)
        assert answer["status"] == 143, answer["log"]
        assert len(RunDir(out).checkpoint_steps()) >= 2
        return out

    def damaged(self, stopped: Path, file: str, damage: Callable[[Path], None]) -> str | None:
        """A damaged file of the newest checkpoint: found, said, an older one taken, the same end."""
        out = self.place / "damaged"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stopped, out)
        run = RunDir(out)
        newest = run.checkpoint(run.checkpoint_steps()[-1])
        damage(newest / file)
        answer = self.order("resume", out)
        if answer["status"] != 0:
            return f"ended with {answer['status']}: {answer['log'][-500:]}"
        if f"{newest.name}" not in answer["log"] or "skipped" not in answer["log"]:
            return "the damage was not told"
        return self.ended_well(out)


def truncated(path: Path) -> None:
    """Its second half is gone."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flipped(path: Path) -> None:
    """One bit in its middle is another."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    """Nothing is left of its content."""
    path.write_bytes(b"")


def missing(path: Path) -> None:
    """It is gone."""
    path.unlink()


DAMAGES = (truncated, flipped, emptied, missing)


def files_of(stopped: Path) -> list[str]:
    """The files of the newest checkpoint."""
    run = RunDir(stopped)
    newest = run.checkpoint(run.checkpoint_steps()[-1])
    return sorted(path.name for path in newest.iterdir())


def mutated(place: Path, stopped: Path, mutate: Callable[[Path], None]) -> str | None:
    """A run whose files were changed anyhow: verifying it tells, or refuses with a problem; no traceback."""
    out = place / "mutated"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(stopped, out)
    mutate(out)
    try:
        found = peftkit.verify_run(out)
    except UserError:
        return None
    except Exception as error:  # noqa: BLE001
        return f"a traceback: {error!r}"
    try:
        json.dumps(found.rows())
    except (TypeError, ValueError) as error:
        return f"no report: {error}"
    return None if found.faults else "a change that was not seen"
