"""A base that claims more positions than it was trained to: the loss by position, and what the advised stretch gains.

    python benchmarks/quality/positions.py

The tests' tiny Llama says 512 in its config.json and was trained on shorter text. A small adapter (rank 2 on v, 30
steps on Python source in rows of up to 512 tokens) does not learn the rest; all layers at the usual rate do, in 40.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cells import ROOT, source_rows

SMALL = {"method": {"name": "lora", "rank": 2, "targets": ["v"]}, "max_steps": 30, "learning_rate": 1e-3}
WHOLE = {"method": {"name": "lora"}, "max_steps": 40, "learning_rate": "auto"}


def recipe_of(rows: Path, *, method: dict[str, Any], max_steps: int, learning_rate: float | str) -> dict[str, Any]:
    """Return the recipe of a run on long rows."""
    train = {"max_steps": max_steps, "learning_rate": learning_rate, "batch_size": 4, "micro_batch": 4}
    return {
        "base": str(ROOT / "tests" / "assets" / "tiny-llama"),
        "method": method,
        "data": {"train": str(rows), "eval": "25%", "waive": ["near-leakage"]},
        "train": {**train, "max_length": 512, "eval_steps": 20, "packing": False},
        "diagnose": {"bounds": {"compute": "40%"}},
    }


def main() -> int:
    """Train, print the verdict and the loss by position, and train what is advised."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from peftkit.api import finetune

    with tempfile.TemporaryDirectory(prefix="peftkit-positions-") as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in source_rows(window=1400)[:260]), encoding="utf-8")
        for label, settings in (("small", SMALL), ("whole", WHOLE)):
            summary = finetune(recipe_of(rows, **settings), out=folder / label, observer=lambda event: None)
            assert summary.verdict is not None
            print(f"{label}: held-out loss {summary.eval_loss_after:.3f}; {summary.verdict.line}")
            stretch = summary.verdict.numbers["positions"]
            for start, end, loss, stretched in stretch["losses"] if stretch else ():
                print(f"  {start:3}-{end:3}  {loss:.2f}  stretched {stretched:.2f}")
            if summary.verdict.cause == "positions":
                changes = summary.verdict.action.overrides
                after = finetune(
                    recipe_of(rows, **settings), changes, out=folder / f"{label}-again", observer=lambda event: None
                )
                print(f"  trained again with {' '.join(changes)}: held-out loss {after.eval_loss_after:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
