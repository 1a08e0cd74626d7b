"""What peftkit decides out of the box, against a sweep of five learning rates by three ranks.

    python benchmarks/quality/sweep.py --data FOLDER [--steps 600] [--cells "python intents"] [--workers 2]

Every training is one line of the results file and is not made again. The split: the laws of the learning rate and of
the forks were fitted elsewhere (docs/quality.md), on other rows and, but for the first, other bases; no number here
set a threshold. Printed at the end: the loss of each way against the best of the sweep, and with `--arms` what other
kinds of LoRA give out of the box.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import CELLS, Cell, options, recipe_of, train_all

RESULTS = Path(__file__).parent.parent / "results" / "quality_sweep.jsonl"
BATCH = 8
RANKS = (64, 16, 4)
ARMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto, EVA": {"init": "eva"},
    "auto, rsLoRA": {"rslora": True},
    "auto, LoRA+": {"lr_ratio": 16.0},
    "auto, DoRA": {"dora": True},
}
FULL_RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
RATES = {
    "python": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "plays": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "minilm": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}


def train(folder: Path, cell: Cell, way: str, seed: int, steps: int, data: Path) -> dict[str, Any]:
    """Train one way. Returns its line of the results file."""
    from peftkit.api import finetune

    recipe = recipe_of(cell, folder, data, steps=steps, batch=BATCH, seed=seed)
    if way in ARMS:
        recipe["method"] |= ARMS[way]
    elif way.startswith("full"):
        recipe["method"] = {"name": "full"}
        recipe["train"]["learning_rate"] = "auto" if way == "full" else float(way.removeprefix("full at "))
    else:
        rank, rate = way.removeprefix("r").split(" at ")
        recipe["method"] |= {"rank": int(rank), "targets": "all-linear"}
        recipe["train"]["learning_rate"] = float(rate)
    summary = finetune(recipe, out=folder / "run", observer=lambda event: None)
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    plan = json.loads((folder / "run" / "plan.json").read_text())
    found = [event for event in events if event["event"] == "rate_found"]
    return {
        "cell": cell.key,
        "way": way,
        "seed": seed,
        "steps": steps,
        "loss": summary.eval_loss_after,
        "loss_before": summary.eval_loss_before,
        "learning_rate": plan["train"]["learning_rate"],
        "rank": (plan["method"]["peft"] or {}).get("arguments", {}).get("r"),
        "usual": found[0]["usual"] if found else plan["train"]["learning_rate"],
        "overhead": sum(event["overhead"] for event in events if event["event"] in {"rate_found", "verdict"}),
        "said": found[0]["text"] if found else "",
    }


def key_of(cell: Cell, way: str, seed: int, steps: int) -> str:
    """Return the name of a training in the results file."""
    return f"{cell.key}/{way}/{seed}/{steps}"


def print_table(lines: Sequence[dict[str, Any]], steps: int) -> None:
    """Print each cell: the best of the sweep, and how far behind it `auto` ends."""
    regrets = []
    print(f"\n{steps} steps of {BATCH} rows; the sweep costs {len(RANKS) * 5} runs")
    for cell in CELLS:
        here = [line for line in lines if line["cell"] == cell.key and line["steps"] == steps]
        full = {line["way"]: line["loss"] for line in here if line["way"].startswith("full")}
        if full:
            print(f"{cell.key:16} {'; '.join(f'{way} {loss:.4f}' for way, loss in full.items())}")
        swept = [line for line in here if line["way"] not in ARMS and line["way"] not in full]
        for auto in (line for line in here if line["way"] == "auto"):
            if len(swept) < len(RANKS) * 5:
                continue
            best = min(swept, key=lambda line: line["loss"])
            regrets.append(100 * (auto["loss"] / best["loss"] - 1))
            print(
                f"{cell.key:16} sweep {best['loss']:.4f} ({best['way']})  auto {auto['loss']:.4f} "
                f"(r{auto['rank']} at {auto['learning_rate']:.3g}, usual {auto['usual']:.3g}) {regrets[-1]:+6.1f} %  "
                f"{1 + auto['overhead']:.3f} runs"
            )
        arms = {line["way"]: line["loss"] for line in here if line["way"] in ARMS}
        if len(arms) > 1:
            print(f"{cell.key:16} {'; '.join(f'{way} {loss:.4f}' for way, loss in arms.items())}")
    if regrets:
        print(f"median {statistics.median(regrets):+.1f} %, worst {max(regrets):+.1f} %")


def main() -> int:
    """Train what is missing and print the table."""
    parser = options(__doc__, results=RESULTS)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="ways that begin so")
    parser.add_argument("--arms", action="store_const", const=len(ARMS), default=1, help="other kinds of LoRA, too")
    parser.add_argument("--full", action="store_true", help="full fine-tuning, too: by its law, and swept")
    asked = parser.parse_args()
    waiting = [
        (key_of(cell, way, asked.seed, asked.steps), (cell, way, asked.seed, asked.steps))
        for rank in (0, *RANKS)  # `auto` of all cells first
        for cell in CELLS
        if cell.key in asked.cells.split(",") or not asked.cells
        for way in (
            [f"r{rank} at {rate:g}" for rate in RATES[cell.base]]
            if rank
            else [*list(ARMS)[: asked.arms], *(["full", *(f"full at {r:g}" for r in FULL_RATES)] if asked.full else [])]
        )
        if way.startswith(asked.only)
    ]
    print_table(train_all(train, waiting, asked), asked.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
