"""Runs with a planted fault, as they are and with `escalate: auto`, which looks at 4, 15 and 40 % of the steps.

    python benchmarks/quality/acting.py --data FOLDER [--cells "plays intents,plays sums"] [--workers 2]

What is printed: the held-out loss of the run without its fault, with it, and with it where it may act; what it did; and
what looking cost, as a share of the run's tokens. The thresholds were set on "python intents".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import CELLS, Cell, options, recipe_of, train_all

RESULTS = Path(__file__).parent.parent / "results" / "quality_acting.jsonl"
STEPS, BATCH = 400, 8
RATES = {64: 0.0025, 16: 0.005, 1: 0.02}  # the law's, about: in rank 1 its scale stays 2
# fault -> (method, factor of the rate)
FAULTS: dict[str, tuple[dict[str, Any], float]] = {
    "none": ({"rank": 64}, 1.0),
    "rate x 10": ({"rank": 64}, 10.0),
    "rate / 10": ({"rank": 64}, 0.1),
    "rank 1": ({"rank": 1}, 1.0),
    "q and v only": ({"rank": 16, "targets": ["q", "v"]}, 1.0),
}


def train(folder: Path, cell: Cell, fault: str, escalate: str, data: Path) -> dict[str, Any]:
    """Train one cell with one fault. Returns its line of the results file."""
    from peftkit.api import finetune
    from peftkit.plan import read_plan
    from peftkit.rundir import RunDir
    from peftkit.rundir.events import VerdictEvent, of_type

    recipe = recipe_of(cell, folder, data, steps=STEPS, batch=BATCH, seed=0)
    method, factor = FAULTS[fault]
    recipe["method"] |= method
    # beside a new head the law halves the rate
    usual = RATES[method["rank"]] / (2 if cell.task == "classes" else 1)
    recipe["train"] |= {"learning_rate": usual * factor, "eval_steps": STEPS // 4}
    recipe["diagnose"] = {"escalate": escalate}
    summary = finetune(recipe, out=folder / "run", observer=lambda event: None)
    run = RunDir(folder / "run")
    return {
        "cell": cell.key,
        "fault": fault,
        "escalate": escalate,
        "loss": summary.eval_loss_after,
        "changes": [
            f"{growth.step}: {growth.cause}" + ("" if growth.kept else ", taken back")
            for growth in read_plan(run).growths
        ],
        "update_paces": [
            verdict.numbers["update_pace"]
            for verdict in of_type(run.events(), VerdictEvent)
            if verdict.numbers.get("update_pace") is not None
        ],
        "overhead": round(sum(verdict.overhead for verdict in of_type(run.events(), VerdictEvent)), 4),
    }


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """Print the losses by cell and fault."""
    by_key = {line["key"]: line for line in lines}
    for cell in CELLS:
        if not any(line["cell"] == cell.key for line in lines):
            continue
        print(f"\n{cell.key}, {STEPS} steps of {BATCH} rows")
        for fault in FAULTS:
            alone, auto = (by_key.get(f"{cell.key}/{fault}/{escalate}") for escalate in ("off", "auto"))
            if alone and auto:
                did = "; ".join(auto["changes"]) or "nothing"
                losses = f"{alone['loss']:.3f} -> {auto['loss']:.3f}"
                print(f"  {fault:14} {losses}  {did}; looking took {auto['overhead']:.1%}")


def main() -> int:
    """Train what is missing and print the table."""
    asked = options(__doc__, results=RESULTS, cells="plays intents,python classes,plays sums").parse_args()
    waiting = [
        (f"{cell.key}/{fault}/{escalate}", (cell, fault, escalate))
        for cell in CELLS
        if cell.key in asked.cells.split(",")
        for fault in FAULTS
        for escalate in ("off", "auto")
    ]
    print_table(train_all(train, waiting, asked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
