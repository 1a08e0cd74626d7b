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

from peftkit.cache import cache_folder
from peftkit.rundir import read_json, write_json

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
