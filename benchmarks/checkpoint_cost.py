"""What checkpoints and guards cost: steps of SmolLM2-135M with them, and with none, in turns in one run.

    python benchmarks/checkpoint_cost.py [--pairs N]

Both trainings are the same but for the recipe's `checkpoint_steps` and the guard, which is told nothing and
judges nothing in the other. Verifying is compared with reading the same bytes and with hashing alone.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import median, write_result

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


def seconds_per_step(kind: str, place: Path, *, guarded: bool) -> float:
    """Median-free mean of the steps after the first two, checkpoints between them included."""
    import peftkit
    from peftkit.train.guard import Guard

    seen: list[float] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            seen.append(time.perf_counter())

    kept = {name: getattr(Guard, name) for name in ("on_pre_optimizer_step", "judge")}
    if not guarded:
        Guard.on_pre_optimizer_step = lambda self, args, state, control, **_: control  # type: ignore
        Guard.judge = lambda self, *args, **named: None  # type: ignore[method-assign]
    try:
        peftkit.finetune(recipe_of(kind, saves=guarded), out=place, observer=observe)
    finally:
        for name, function in kept.items():
            setattr(Guard, name, function)
    return (seen[-1] - seen[1]) / (len(seen) - 2)


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
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=["qlora", "lora", "full"])
    given = parser.parse_args()
    rows = []
    for kind in given.methods:
        times: dict[bool, list[float]] = {True: [], False: []}
        with tempfile.TemporaryDirectory() as folder:
            for pair in range(given.pairs):
                for guarded in (pair % 2 == 0, pair % 2 == 1):  # in turns, so that neither is always first
                    out = Path(folder) / f"{pair}-{guarded}"
                    times[guarded].append(seconds_per_step(kind, out, guarded=guarded))
            speed = verify_speed(Path(folder) / f"{given.pairs - 1}-True")
        plain, guarded_ = median(times[False]), median(times[True])
        ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
        row = {
            "method": kind,
            "step_seconds_without": round(plain, 4),
            "step_seconds_with": round(guarded_, 4),
            "ratio_of_medians": round(guarded_ / plain, 4),
            "ratios": [round(one, 4) for one in ratios],
            "checkpoint": {name: round(value) for name, value in speed.items()},
        }
        rows.append(row)
        print(
            f"{kind:6} {plain:.3f} s a step without, {guarded_:.3f} s with: x{guarded_ / plain:.3f}; "
            f"verified at {speed['verify_bytes_per_second'] / 2**20:,.0f} MiB/s, "
            f"hashed at {speed['hash_bytes_per_second'] / 2**20:,.0f}, "
            f"read at {speed['read_bytes_per_second'] / 2**20:,.0f}",
            flush=True,
        )
    if given.pairs >= 5:
        write_result("checkpoint_cost", {"steps": STEPS, "every": EVERY, "rows": rows})


if __name__ == "__main__":
    main()
