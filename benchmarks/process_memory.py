"""What a CPU's process really grows by in training, against the trace: glibc keeps freed pages.

    python benchmarks/process_memory.py

Each row fine-tunes the quickstart's model in a process of its own, for four steps or, where it says so, for the
recipe's sixty; the run itself compares (event "memory"). The share is what was kept of what comes and goes: it is where
the plan's reserve on a CPU comes from. The last row forbids glibc to keep blocks of 4 MiB and more. torch's own
allocator is compared in memory.py.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write_result

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
SHORT = ["train.max_steps=4", "train.eval_steps=4", "evaluate.metric=null"]
LONG = ["evaluate.metric=null"]
ROWS: dict[str, tuple[list[str], dict[str, str]]] = {
    "lora": ([*SHORT, "method.name=lora"], {}),
    "lora, pieces of 2": ([*SHORT, "method.name=lora", "train.micro_batch=2"], {}),
    "qlora": (SHORT, {}),
    "qlora, pieces of 4": ([*SHORT, "train.micro_batch=4"], {}),
    "qlora, recomputed": ([*SHORT, "train.gradient_checkpointing=true"], {}),
    "qlora, 60 steps": (LONG, {}),
    "the same, threshold": (LONG, {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}),
}


def run(overrides: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The run's own comparison, the share of what comes and goes that the process kept, and a step's time."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        command = [sys.executable, "-m", "peftkit", "finetune", RECIPE, *overrides, "--out", str(out)]
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        subprocess.run(command, check=True, capture_output=True, env=variables)
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        plan = json.loads((out / "plan.json").read_text())
    [told] = [event for event in events if event["event"] == "memory"]
    peaks = [sum(peak["components"].values()) for peak in plan["memory"]["peaks"]]
    moving = max(peaks) - min(peaks)
    share = (told["process_bytes"] - told["measured_bytes"]) / moving
    kept = {key: told[key] for key in ("predicted_bytes", "measured_bytes", "process_bytes", "error_percent")}
    seconds = statistics.median(event["step_seconds"] for event in events if event["event"] == "step")
    return {**kept, "share_kept": round(share, 2), "step_seconds": round(seconds, 2)}


def main() -> None:
    found = {}
    for label, (overrides, environment) in ROWS.items():
        found[label] = one = run(overrides, environment)
        print(
            f"{label:20s} predicted {one['predicted_bytes'] / 2**20:8.0f} MiB  "
            f"measured {one['measured_bytes'] / 2**20:8.0f} MiB  {one['error_percent']:+6.1f} %  "
            f"process {one['process_bytes'] / 2**20:8.0f} MiB  "
            f"kept {one['share_kept']:.2f} of what comes and goes  "
            f"{one['step_seconds']:.2f} s a step",
            flush=True,
        )
    write_result("process_memory", {"rows": found})


if __name__ == "__main__":
    main()
