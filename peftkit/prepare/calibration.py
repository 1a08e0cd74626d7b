"""What runs measured on this machine: speed and memory, kept beside the cache, to share if one likes.

The file holds device names, plan keys and numbers: no paths, no data, no recipes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.archs import ModelShape
from peftkit.hub import cache_folder
from peftkit.plan import Plan
from peftkit.plan.throughput import flops_per_token, speed_key
from peftkit.rundir import RunDir, read_json, write_json

_NEW_SHARE = 0.5  # how much a new run counts against what was known
_KEPT = 200  # comparisons of memory


@dataclass(frozen=True)
class Calibration:
    """`speeds`: device name -> kind of work -> operations per second; `memory`: predicted and measured."""

    speeds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    memory: tuple[Mapping[str, Any], ...] = ()


def calibration_file() -> Path:
    """Where it is kept."""
    return cache_folder() / "calibration.json"


def read_calibration() -> Calibration:
    """What was measured so far; nothing where the file is missing or cut."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = read_json(calibration_file())
        speeds = {
            device: {kind: float(speed) for kind, speed in kinds.items() if _is_speed(speed)}
            for device, kinds in dict(found["speeds"]).items()
            if isinstance(kinds, dict)
        }
        return Calibration(speeds, tuple(one for one in found["memory"] if isinstance(one, dict)))
    return Calibration()


def _is_speed(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time: what each measured is kept."""
    import fcntl

    calibration_file().parent.mkdir(parents=True, exist_ok=True)
    with calibration_file().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add_run(device: str, key: str, *, flops_per_second: float | None, memory: Mapping[str, Any]) -> None:
    """Take in what a run measured. Where the cache cannot be written, it is forgotten."""
    with suppress(OSError), _alone():
        _add(device, key, flops_per_second, memory)


def _add(device: str, key: str, flops_per_second: float | None, memory: Mapping[str, Any]) -> None:
    known = read_calibration()
    speeds = {name: dict(kinds) for name, kinds in known.speeds.items()}
    if flops_per_second:
        kinds = speeds.setdefault(device, {})
        old = kinds.get(key, flops_per_second)
        kinds[key] = old + _NEW_SHARE * (flops_per_second - old)
    compared = [*known.memory, {"device": device, "kind": key, **memory}][-_KEPT:]
    write_json(calibration_file(), {"speeds": speeds, "memory": compared})


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
