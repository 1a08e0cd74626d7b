"""What a run measured against what its plan said: memory, and the speed that plans to come go by."""

from __future__ import annotations

from typing import Any

from peftkit.archs import ModelShape
from peftkit.plan import Plan
from peftkit.plan.throughput import flops_per_token, speed_key
from peftkit.run.calibration import add_run
from peftkit.rundir import RunDir

_COARSE_BYTES = 256 * 2**20  # less than this of a process's size is noise
_CALIBRATING_STEPS = 10  # fewer say little of a speed


def compare_memory(plan: Plan, used: dict[str, int], before: int) -> dict[str, Any] | None:
    """Predicted against measured: what a GPU allocated; on a CPU the model and what the process grew by.

    `used` is the peak of training, `before` what the process held besides the model when it began. A process
    also keeps some of what was freed, so that a CPU's measure is the higher one.
    """
    if plan.memory is None:
        return None
    steps = [peak for peak in plan.memory.peaks if peak.phase not in {"generation", "checkpoint write"}]
    expected = max(peak.allocated_bytes for peak in steps)
    on_gpu = "peak_allocated_bytes" in used
    measured = used["peak_allocated_bytes"] if on_gpu else used.get("peak_resident_bytes", 0) - before
    told = measured > (0 if on_gpu else _COARSE_BYTES)
    return {
        "depth": plan.memory.depth,
        "predicted_bytes": expected,
        "measured_bytes": measured,
        "error_percent": round(100 * (expected - measured) / measured, 1) if told else None,
    }


def calibrate(run: RunDir, plan: Plan, shape: ModelShape, *, device: str, mean_tokens: float) -> None:
    """Keep what this run measured, for the plans to come."""
    events = run.events()
    rates = sorted(e["tokens_per_second"] for e in events if e.get("tokens_per_second"))
    compared = [e for e in events if e["event"] == "memory"]
    work = flops_per_token(shape, plan, mean_tokens)
    kept = compared[-1] if compared else {}
    add_run(
        device,
        speed_key(plan),
        flops_per_second=work * rates[len(rates) // 2] if len(rates) >= _CALIBRATING_STEPS else None,
        memory={k: v for k, v in kept.items() if k.endswith(("_bytes", "_percent", "depth"))},
    )
