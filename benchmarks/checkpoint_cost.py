"""What checkpoints and guards cost: steps of SmolLM2-135M with them, and with none, in turns in one run.

    python benchmarks/checkpoint_cost.py [--pairs N]

Both trainings are the same, but in one the guard's and the writer's functions do nothing. What steps wait for
them is measured too, because on a machine that others use the ratio of two times says little of one in a
hundred. Verifying is compared with reading the same bytes and with hashing alone.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import median, write_result
from peftkit.train.checkpoint.writer import CheckpointWriter
from peftkit.train.guard import StepGuard

STEPS, EVERY = 24, 6  # a checkpoint each six steps: far more often than any recipe decides


def recipe_of(kind: str, *, saves: bool) -> dict[str, Any]:
    """QLoRA of the quickstart, or full fine-tuning."""
    method = {"name": "qlora", "rank": 16, "targets": "all-linear"} if kind == "qlora" else {"name": kind}
    data = Path(__file__).parents[1] / "recipes" / "data"
    return {
        "base": "embedded:smollm2-135m-instruct",
        "method": method,
        "data": {"train": str(data / "banking77-10.train.jsonl"), "eval": None},
        "train": {
            "max_steps": STEPS,
            "batch_size": 8,
            "micro_batch": 8,
            "max_length": 128,
            "checkpoint_steps": EVERY if saves else 10 * STEPS,
            "learning_rate": 1e-4,
        },
    }


HELD = (
    (StepGuard, "on_pre_optimizer_step"),
    (StepGuard, "judge"),
    (CheckpointWriter, "submit"),
    (CheckpointWriter, "poll"),
)


@contextmanager
def watched(*, guarded: bool) -> Iterator[list[float]]:
    """Seconds for which steps wait for guards and checkpoints; without `guarded` they do nothing."""
    spent: list[float] = []
    kept = [(owner, name, getattr(owner, name)) for owner, name in HELD]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named) if guarded else None
            finally:
                spent.append(time.perf_counter() - started)

        return inner

    for owner, name, function in kept:
        setattr(owner, name, timed(function))
    try:
        yield spent
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def steps_of(kind: str, place: Path, *, guarded: bool) -> tuple[float, float]:
    """(seconds a step, share of it that waits for guards and checkpoints), without the first two steps."""
    import peftkit

    seen: list[tuple[float, float]] = []
    with watched(guarded=guarded) as spent:

        def observe(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                seen.append((time.perf_counter(), sum(spent)))

        peftkit.finetune(recipe_of(kind, saves=guarded), out=place, observer=observe)
    seconds, held = (last - first for last, first in zip(seen[-1], seen[1], strict=True))
    return seconds / (len(seen) - 2), held / seconds


def verify_speed(run: Path) -> dict[str, float]:
    """Bytes per second of verifying a run's largest checkpoint, of hashing, and of reading."""
    from peftkit.rundir import RunDir, verify_folder

    found = RunDir(run)
    folder = found.checkpoint(found.checkpoint_steps()[-1])
    files = [path for path in folder.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)

    def timed(work: Any) -> float:
        took = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            took.append(time.perf_counter() - started)
        return size / median(took)

    def read() -> None:
        for path in files:
            with path.open("rb") as file:
                while file.read(2**20):
                    pass

    return {
        "bytes": size,
        "verify_bytes_per_second": timed(lambda: verify_folder(folder)),
        "hash_bytes_per_second": timed(lambda: [hashlib.sha256(path.read_bytes()) for path in files]),
        "read_bytes_per_second": timed(read),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=["qlora", "lora", "full"])
    given = parser.parse_args()
    rows = []
    for kind in given.methods:
        times: dict[bool, list[float]] = {True: [], False: []}
        shares: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            for pair in range(given.pairs):
                for guarded in (pair % 2 == 0, pair % 2 == 1):  # in turns, so that neither is always first
                    out = Path(folder) / f"{pair}-{guarded}"
                    seconds, share = steps_of(kind, out, guarded=guarded)
                    times[guarded].append(seconds)
                    shares += [share] if guarded else []
            speed = verify_speed(Path(folder) / f"{given.pairs - 1}-True")
        plain, with_ = median(times[False]), median(times[True])
        rows.append(
            {
                "method": kind,
                "step_seconds_without": times[False],
                "step_seconds_with": times[True],
                "ratio": round(with_ / plain, 4),
                "share_held_up": shares,
                "checkpoint": {name: round(value) for name, value in speed.items()},
            }
        )
        print(
            f"{kind:6} {plain:.3f} s a step without, {with_:.3f} s with: x{with_ / plain:.3f}; held up for "
            f"{median(shares):.2%}; a checkpoint of {speed['bytes'] / 2**20:,.0f} MiB verified at "
            f"{speed['verify_bytes_per_second'] / 2**20:,.0f} MiB/s, hashed at "
            f"{speed['hash_bytes_per_second'] / 2**20:,.0f}, read at "
            f"{speed['read_bytes_per_second'] / 2**20:,.0f}",
            flush=True,
        )
    write_result("checkpoint_cost", {"steps": STEPS, "every": EVERY, "pairs": given.pairs, "rows": rows})


if __name__ == "__main__":
    main()
