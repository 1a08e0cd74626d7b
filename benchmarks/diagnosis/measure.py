"""Whether the planted faults are faults: each against healthy, its remedy, and remedies that are not its own.

    python benchmarks/diagnosis/measure.py --data FOLDER [--seeds 0,1,2] [--tasks intents] [--workers 1]

Trains without any diagnosis, resumes from its results file, and prints one table per task.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults import FAULTS
from suite import Cell, act, read_results, run_cells, words
from tasks import TASKS
from tiny_model import data_folder

RESULTS = Path(__file__).parent.parent / "results" / "diagnosis_faults.jsonl"
TRIED = {  # of each fault: what should mend it, then what should not
    "modules": ("rank x4", "lr x3", "steps x2", "embeddings"),  # all-linear makes it healthy
    "rank": ("rank x4", "lr x3", "steps x2", "embeddings", "lr /3"),
    "embeddings": ("embeddings", "lr x3", "rank x4", "steps x2"),
    "few-rows": ("rank x4", "steps x2"),
    "healthy": ("lr x3", "lr /3", "steps x2", "rank x4"),
}


def cells_of(tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Healthy runs and faults of every seed; remedies for the first."""
    found = [Cell(task, fault, seeds[0]) for fault in FAULTS for task in tasks]
    found += [Cell(task, "healthy", seed) for seed in seeds[1:] for task in tasks]
    found += [
        act(Cell(task, fault, seeds[0]), action)
        for rank in range(max(map(len, TRIED.values())))
        for fault, actions in TRIED.items()
        for action in actions[rank : rank + 1]
        for task in tasks
    ]
    planted = [fault for fault in FAULTS if fault != "healthy"]
    return found + [Cell(task, fault, seed) for seed in seeds[1:] for fault in planted for task in tasks]


def print_table(task: str, lines: Sequence[dict[str, Any]]) -> None:
    """Every run of a task: loss as measured, loss of the answers, both against the target."""
    print(f"\n{task:12} {'action':12} seed   loss  target reached  of answers  on training")
    for line in sorted(lines, key=lambda line: [*FAULTS].index(line["fault"])):
        if line["task"] != task:
            continue
        if "error" in line:
            print(f"{line['fault']:12} {line['action']:12} {line['seed']:4} {line['error'][:90]}")
            continue
        reached = "yes" if line["reached"] else "no"
        print(f"{line['fault']:12} {line['action']:12} {line['seed']:4} {line['loss']:6.3f}", end=" ")
        print(f"{line['target']:7.3f} {reached:7}", end=" ")
        print(f"{line['loss_of_answers']:10.3f} {line['loss_train']:12.3f}")


def main() -> int:
    """Train what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--tasks", type=words, default=list(TASKS))
    parser.add_argument("--seeds", type=words, default=["0", "1"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    cells = cells_of(asked.tasks, [int(seed) for seed in asked.seeds])
    data = data_folder(asked.data)
    run_cells(cells, results=asked.results, workers=asked.workers, data=data, diagnosed=False)
    lines = read_results(asked.results)
    for task in asked.tasks:
        print_table(task, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
