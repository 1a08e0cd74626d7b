"""Four planted causes on a real model: SmolLM2-135M on BANKING77, one seed, 100 steps (some 15 minutes).

    python benchmarks/diagnosis/smollm.py [--only rate-low,labels]

Resumable: a finished fault is one line of the results file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from suite import read_results, words

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "diagnosis_smollm.jsonl"
DATA = ROOT / "recipes" / "data"
TARGET = 0.2  # the quickstart, a healthy run of 60 steps, reaches 0.10
HEALTHY: dict[str, Any] = {
    "base": "embedded:smollm2-135m-instruct",
    "method": {"name": "lora", "rank": 16, "targets": "all-linear"},
    "train": {
        "max_steps": 100,
        "batch_size": 8,
        "micro_batch": 8,
        "learning_rate": 5e-4,
        "max_length": 256,
        "eval_steps": 20,
    },
    "evaluate": {"metric": None},
    "diagnose": {"target": {"metric": "eval_loss", "value": TARGET}},
}
# name -> (planted cause, section, changes)
FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "healthy": ("none", "train", {}),
    "rate-low": ("learning rate too low", "train", {"learning_rate": 5e-5}),
    "rate-high": ("learning rate too high", "train", {"learning_rate": 5e-3}),
    "modules": ("target modules", "method", {"rank": 4, "targets": ["q", "v"]}),
    "labels": ("data: labels or masks broken", "train", {}),
}


def rows_of(fault: str, folder: Path) -> Path:
    """The training rows; with shuffled answers where labels are the fault."""
    source = DATA / "banking77-10.train.jsonl"
    if fault != "labels":
        return source
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    answers = [row["messages"][-1]["content"] for row in rows]
    random.Random(0).shuffle(answers)
    for row, answer in zip(rows, answers, strict=True):
        row["messages"][-1]["content"] = answer
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(fault: str) -> dict[str, Any]:
    """Train a fault and have it diagnosed."""
    from peftkit.api import diagnose_run, finetune

    cause, section, changes = FAULTS[fault]
    folder, started = Path(tempfile.mkdtemp(prefix="peftkit-smollm-")), time.perf_counter()
    try:
        recipe = json.loads(json.dumps(HEALTHY))
        recipe[section] |= changes
        recipe["data"] = {"train": str(rows_of(fault, folder)), "eval": str(DATA / "banking77-10.eval.jsonl")}
        summary = finetune(recipe, out=folder / "run")
        verdict = diagnose_run(folder / "run")
        return {
            "key": fault,
            "expected": cause,
            "found": verdict.cause,
            "said": verdict.said,
            "action": list(verdict.action.overrides),
            "loss": summary.eval_loss_after,
            "overhead": verdict.overhead,
            "numbers": json.loads(json.dumps(verdict.numbers)),
            "train_seconds": round(summary.train_seconds, 1),
            "seconds": round(time.perf_counter() - started, 1),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run what is missing and print the table."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=words, default=list(FAULTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    made = {line["key"] for line in read_results(asked.results)}
    for fault in asked.only:
        if fault in made:
            continue
        line = run(fault)
        with asked.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    for line in read_results(asked.results):
        told = f"loss {line['loss']:.3f}, overhead {line['overhead']:.1%}, {line['seconds']:.0f} s"
        print(f"{line['key']:10} planted {line['expected']:28} found {line['found']:28} {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
