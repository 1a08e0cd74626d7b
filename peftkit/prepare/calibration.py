"""The calibration file: speed and memory measured by runs on this machine, kept beside the cache.

The file holds device names, plan keys and numbers: no paths, no data, no recipes.
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.archs import ModelShape
from peftkit.hub import cache_folder
from peftkit.plan import Memory, Plan
from peftkit.plan.throughput import flops_per_token, speed_key
from peftkit.rundir import RunDir, read_json, write_json
from peftkit.rundir.events import MemoryEvent, StepEvent, last_of, of_type

_NEW_RUN_WEIGHT = 0.5  # how much a new run counts against what was known
_MAX_COMPARISONS = 200  # comparisons of memory


@dataclass(frozen=True)
class Calibration:
    """Measurements of earlier runs on this machine.

    `speeds`: device name -> kind of plan -> operations per second; `memory`: predicted and measured bytes.
    """

    speeds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    memory: tuple[Mapping[str, Any], ...] = ()


def calibration_file() -> Path:
    """Return the path of the calibration file."""
    return cache_folder() / "calibration.json"


def read_calibration() -> Calibration:
    """Read the calibration; empty where the file is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = read_json(calibration_file())
        speeds = {
            device: {
                kind: float(speed)
                for kind, speed in kinds.items()
                if (isinstance(speed, int | float) and math.isfinite(speed) and speed > 0)
            }
            for device, kinds in dict(content["speeds"]).items()
            if isinstance(kinds, dict)
        }
        return Calibration(speeds, tuple(entry for entry in content["memory"] if isinstance(entry, dict)))
    return Calibration()


@contextmanager
def _file_lock() -> Iterator[None]:
    """Hold the lock of the calibration file, so that no process overwrites another's measurements."""
    calibration_file().parent.mkdir(parents=True, exist_ok=True)
    with calibration_file().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add_run(device: str, key: str, *, flops_per_second: float | None, memory: Mapping[str, object]) -> None:
    """Record what a run measured, as a moving average. Does nothing where the cache is not writable."""
    with suppress(OSError), _file_lock():
        calibration = read_calibration()
        speeds = {name: dict(kinds) for name, kinds in calibration.speeds.items()}
        if flops_per_second:
            kinds = speeds.setdefault(device, {})
            previous_speed = kinds.get(key, flops_per_second)
            kinds[key] = previous_speed + _NEW_RUN_WEIGHT * (flops_per_second - previous_speed)
        comparisons = [*calibration.memory, {"device": device, "kind": key, **memory}][-_MAX_COMPARISONS:]
        write_json(calibration_file(), {"speeds": speeds, "memory": comparisons})


_NOISE_BYTES = 256 * 2**20  # less than this of a process's size is noise
_MIN_CALIBRATION_STEPS = 10  # fewer say little of a speed


def compare_memory(
    memory: Memory, usage: dict[str, int], baseline_bytes: int, preflight_bytes: int | None, state_bytes: int
) -> MemoryEvent:
    """Compare predicted with measured bytes of training's tensors.

    On a GPU `usage`, the allocator's peak of training. On a CPU the allocator's peak of the preflight, whose batch
    is the longest, and the optimizer's states of `state_bytes`; what the process grew by beyond `baseline_bytes`,
    freed memory that it keeps included, is told beside it, and stands in where there is no `preflight_bytes`.
    """
    phases = {"forward", "backward"} if preflight_bytes else {"forward", "backward", "optimizer step", "evaluation"}
    predicted_bytes = max(peak.allocated_bytes for peak in memory.peaks if peak.phase in phases)
    if "peak_allocated_bytes" in usage:
        measured_bytes, process_bytes = usage["peak_allocated_bytes"], None
    else:
        process_bytes = usage.get("peak_resident_bytes", 0) - baseline_bytes
        measured_bytes = preflight_bytes + state_bytes if preflight_bytes else process_bytes
    error = 100 * (predicted_bytes - measured_bytes) / max(1, measured_bytes)
    is_meaningful = measured_bytes > (_NOISE_BYTES if measured_bytes == process_bytes else 0)
    return MemoryEvent(
        depth=memory.depth,
        predicted_bytes=predicted_bytes,
        measured_bytes=measured_bytes,
        error_percent=round(error, 1) + 0.0 if is_meaningful else None,  # no -0.0
        process_bytes=process_bytes,
    )


def calibrate(run: RunDir, plan: Plan, shape: ModelShape, *, device: str, mean_tokens: float) -> None:
    """Record the speed and memory that this run measured, for later plans."""
    events = run.events()
    speeds = sorted(e.tokens_per_second for e in of_type(events, StepEvent) if e.tokens_per_second)
    token_flops = flops_per_token(shape, plan, mean_tokens)
    latest: Mapping[str, Any] = last_of(events, MemoryEvent) or {}
    add_run(
        device,
        speed_key(plan),
        flops_per_second=token_flops * speeds[len(speeds) // 2] if len(speeds) >= _MIN_CALIBRATION_STEPS else None,
        memory={k: v for k, v in latest.items() if k.endswith(("_bytes", "_percent", "depth"))},
    )
