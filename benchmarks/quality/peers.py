"""What other tools' documented defaults give on the same base, data, steps and seeds, trained here.

    python benchmarks/quality/peers.py --data FOLDER [--seeds 0,1,2] [--cells "python intents"] [--workers 2]

Only what decides quality is taken from them: learning rate, schedule, rank, alpha, targets, dropout, weight decay. They
were read on 2026-11-30 in: LLaMA-Factory's web page and arguments; axolotl's examples/llama-3/lora-1b.yml; Unsloth's
notebooks; TRL 1.16's ModelConfig and SFTConfig; PEFT 0.21's LoraConfig with transformers' TrainingArguments; ms-swift's
command-line parameters.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import CELLS, Cell, options, recipe_of, train_all
from sweep import BATCH

RESULTS = Path(__file__).parent.parent / "results" / "quality_peers.jsonl"
SMOLLM2 = Cell("smollm2", "intents")
STEPS = {"smollm2": 60}
LINEAR, COSINE = {"kind": "linear", "warmup": 0.0}, {"kind": "cosine", "warmup": 0.0}
# name -> (method, train)
PEERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "peftkit": ({}, {}),
    "LLaMA-Factory": ({"rank": 8, "alpha": 16.0}, {"learning_rate": 5e-5, "schedule": COSINE}),
    "Axolotl": (
        {"rank": 16, "alpha": 32.0, "dropout": 0.05},
        {"learning_rate": 2e-4, "schedule": {"kind": "cosine", "warmup_steps": 10}},
    ),
    "Unsloth": (
        {"rank": 16, "alpha": 16.0},
        {"learning_rate": 2e-4, "schedule": {"kind": "linear", "warmup_steps": 5}, "weight_decay": 0.01},
    ),
    "TRL": (
        {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": ["q", "v"]},
        {"learning_rate": 2e-5, "schedule": LINEAR},
    ),
    "PEFT": ({"rank": 8, "alpha": 8.0, "targets": ["q", "v"]}, {"learning_rate": 5e-5, "schedule": LINEAR}),
    "ms-swift": (
        {"rank": 8, "alpha": 32.0, "dropout": 0.05},
        {"learning_rate": 1e-4, "schedule": {"kind": "cosine", "warmup": 0.05}},
    ),
}


def train(folder: Path, cell: Cell, name: str, seed: int, data: Path) -> dict[str, Any]:
    """Train one cell by one tool's defaults. Returns its line of the results file."""
    from peftkit.api import finetune

    steps = STEPS.get(cell.base, 600)
    recipe = recipe_of(cell, folder, data, steps=steps, batch=BATCH, seed=seed)
    method, settings = PEERS[name]
    recipe["method"] |= method
    recipe["train"] |= settings
    if cell.task == "intents":
        recipe["evaluate"] = {"metric": "exact_match", "max_new_tokens": 16, "max_examples": 240}
    summary = finetune(recipe, out=folder / "run", observer=lambda event: None)
    return {
        "cell": cell.key,
        "name": name,
        "seed": seed,
        "steps": steps,
        "loss": summary.eval_loss_after,
        "metric": summary.metric_after,
    }


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """Print loss and metric by cell and tool: mean and spread over seeds."""
    for cell in (SMOLLM2, *CELLS):
        here = [line for line in lines if line["cell"] == cell.key]
        if here:
            print(f"\n{cell.key}, {here[0]['steps']} steps of {BATCH} rows")
        for name in PEERS:
            mine = [line for line in here if line["name"] == name]
            if mine:
                losses = [line["loss"] for line in mine]
                metrics = [line["metric"] for line in mine if line["metric"] is not None]
                spread = f" +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
                exact = f"  exact match {statistics.mean(metrics):.2f}" if metrics else ""
                print(f"  {name:14} loss {statistics.mean(losses):.3f}{spread}{exact}  seeds {len(mine)}")


def main() -> int:
    """Train what is missing and print the table."""
    cells = "smollm2 intents,python intents,python sums,python plays"
    parser = options(__doc__, results=RESULTS, cells=cells)
    parser.add_argument("--seeds", default="0,1,2")
    asked = parser.parse_args()
    waiting = [
        (f"{cell.key}/{name}/{seed}", (cell, name, int(seed)))
        for seed in asked.seeds.split(",")
        for cell in (SMOLLM2, *CELLS)
        if cell.key in asked.cells.split(",")
        for name in PEERS
    ]
    print_table(train_all(train, waiting, asked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
