"""What every benchmark needs: the machine, medians, a result file."""

from __future__ import annotations

import json
import os
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftkit.model.hardware import detect_device_without_torch
from peftkit.prepare.environment import versions

RESULTS = Path(__file__).parent / "results"


def median(values: list[float]) -> float:
    return statistics.median(values)


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json with date, machine and versions beside the numbers."""
    RESULTS.mkdir(exist_ok=True)
    device = detect_device_without_torch()
    machine = {"device": device.name, "cores": os.cpu_count(), "memory_bytes": device.memory_bytes}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"made_at": when, "machine": machine, "versions": versions(), **result}, indent=2) + "\n"
    )
    return path
