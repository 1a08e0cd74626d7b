"""How long a person waits for help, for an error in a recipe, and for a dry run. Median of 5.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import median, write_result

RUNS = 5
ROOT = Path(__file__).parent.parent
BAD = "base: org/model\nmethod: {name: lora, rnk: 8}\ndata: {train: x.jsonl}\n"
TARGETS = {"--help": 0.25, "an error in a recipe": 0.6, "finetune --dry-run": 1.5}


def wait_seconds(command: list[str], code: int) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != code:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr.decode()}")
    return seconds


def main() -> None:
    peftkit = str(Path(sys.executable).parent / "peftkit")
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder) / "bad.yaml"
        bad.write_text(BAD)
        commands = {
            "the interpreter alone": ([sys.executable, "-c", "pass"], 0),
            "--help": ([peftkit, "--help"], 0),
            "an error in a recipe": ([peftkit, "finetune", str(bad)], 2),
            "finetune --dry-run": ([peftkit, "finetune", "recipes/quickstart.yaml", "--dry-run"], 0),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(RUNS + 1):  # the first warms the disk cache and is not counted
            for name, (command, code) in commands.items():
                taken = wait_seconds(command, code)
                if run:
                    seconds[name].append(taken)
    floor = median(seconds["the interpreter alone"])
    for name, values in seconds.items():
        target = f"  target {TARGETS[name]} s" if name in TARGETS else ""
        print(f"{name:<22} {median(values):.3f} s  x{median(values) / floor:.1f} of the interpreter{target}")
    path = write_result(
        "startup",
        {"seconds": seconds, "median_seconds": {n: median(v) for n, v in seconds.items()}, "target_seconds": TARGETS},
    )
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
