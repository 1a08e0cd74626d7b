"""QLoRA of the embedded model on a CPU: a step with fp32 compute against one with bf16, in turn.

    python benchmarks/cpu_precision.py

The plan picks fp32 on CPUs for what this prints. One step: 8 rows of 40 tokens, forward and backward.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import torch
from common import median, write_result

from peftkit import make_plan
from peftkit.model.adapter.attach import attach_adapter
from peftkit.model.base.locate import locate_base
from peftkit.model.load import load_model, resolve_source

STEPS, ROUNDS = 4, 2


def step_seconds(model: torch.nn.Module) -> float:
    """One forward and backward pass."""
    ids = torch.randint(5, 49_000, (8, 40), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.perf_counter() - started


def measure(precision: str) -> float:
    """Median seconds of a step; the first step warms up and is not counted."""
    logging.disable(logging.WARNING)
    plan = make_plan("quickstart", [f"train.precision={precision}"])
    base = locate_base(plan.base.id, revision=None, where="base")
    model = attach_adapter(load_model(resolve_source(base, "base"), plan.base, device="cpu"), plan, None).train()
    return median([step_seconds(model) for _ in range(STEPS + 1)][1:])


def main() -> None:
    if len(sys.argv) > 1:  # one precision in a process of its own: two models in one slow each other down
        print(measure(sys.argv[1]))
        return
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(ROUNDS):
        for precision, values in seconds.items():
            command = [sys.executable, __file__, precision]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(float(done.stdout))
    for precision, values in seconds.items():
        print(f"{precision}  {median(values):.2f} s a step")
    ratio = median(seconds["bf16"]) / median(seconds["fp32"])
    print(f"bf16 / fp32 {ratio:.2f}")
    write_result("cpu_precision", {"seconds": seconds, "ratio_bf16_to_fp32": ratio})


if __name__ == "__main__":
    main()
