"""20,000 steps of the tiny model with a checkpoint every 20: does anything grow?

    python benchmarks/chaos/soak.py [--steps N]

Resident memory and open files are read at each checkpoint; the slope is that of a straight line through the
second half of the run, when all that is kept once is kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil

from benchmarks.common import write_result
from tests.rigs.chaos.scenes import recipe_at

EVERY = 20


def slope(points: list[tuple[int, float]]) -> float:
    """Of the least-squares line through (step, value)."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    import torch

    torch.set_num_threads(1)
    import peftkit

    process = psutil.Process()
    resident: list[tuple[int, float]] = []
    handles: list[tuple[int, float]] = []
    threads: list[int] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            resident.append((event["step"], float(process.memory_info().rss)))
            handles.append((event["step"], float(process.num_fds())))
            threads.append(process.num_threads())

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipe = recipe_at(place, max_steps=steps, checkpoint_steps=EVERY, eval_steps=1000)
        started = time.monotonic()
        summary = peftkit.finetune(recipe, out=place / "run", observer=observe)
        seconds = time.monotonic() - started
        assert summary.result is not None
        assert peftkit.verify_run(place / "run").faults == ()
    half = len(resident) // 2
    result = {
        "steps": steps,
        "checkpoints": len(resident),
        "seconds": round(seconds, 1),
        "resident_first_bytes": resident[0][1],
        "resident_half_bytes": resident[half][1],
        "resident_last_bytes": resident[-1][1],
        "resident_bytes_per_step": round(slope(resident[half:]), 1),
        "handles_first": handles[0][1],
        "handles_last": handles[-1][1],
        "handles_per_1000_steps": round(1000 * slope(handles[half:]), 4),
        "threads_most": max(threads),
    }
    for name, value in result.items():
        print(f"{name:28} {value:,}")
    if steps >= 20_000:
        write_result("soak", result)


if __name__ == "__main__":
    main()
