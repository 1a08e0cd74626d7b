"""What runs measured on this machine: speed and memory, kept beside the cache, to share if one likes.

The file holds device names, plan keys and numbers: no paths, no data, no recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.model.locate import cache_folder
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
        return Calibration(dict(found["speeds"]), tuple(found["memory"]))
    return Calibration()


def add_run(device: str, key: str, *, flops_per_second: float | None, memory: Mapping[str, Any]) -> None:
    """Take in what a run measured."""
    known = read_calibration()
    speeds = {name: dict(kinds) for name, kinds in known.speeds.items()}
    if flops_per_second:
        kinds = speeds.setdefault(device, {})
        old = kinds.get(key, flops_per_second)
        kinds[key] = old + _NEW_SHARE * (flops_per_second - old)
    compared = [*known.memory, {"device": device, "kind": key, **memory}][-_KEPT:]
    calibration_file().parent.mkdir(parents=True, exist_ok=True)
    write_json(calibration_file(), {"speeds": speeds, "memory": compared})
