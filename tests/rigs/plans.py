"""Plans for tests: the tiny model on a CPU."""

from __future__ import annotations

import json
from typing import Any

from peftkit.archs import shape_from_config
from peftkit.plan import DataFacts, DeviceFacts, Facts, ModelFacts, Plan, make_plan
from peftkit.recipe import load
from tests.conftest import TINY_LLAMA

CPU = DeviceFacts("cpu", "a CPU", 24 * 2**30, True, True)


def plan_for(
    config: dict[str, Any],
    method: Any,
    *,
    task: str = "auto",
    device: DeviceFacts = CPU,
    rows: int | None = 24,
    data_format: str = "prompt-completion",
    labels: tuple[str, ...] = (),
    **sections: Any,
) -> Plan:
    """The plan of a recipe on a model of this configuration."""
    sections.setdefault("train", {"max_length": 64})
    loaded = load({"base": "org/model", "method": method, "data": {"train": "x.jsonl"}, **sections})
    shape = shape_from_config({**config, "num_labels": max(2, len(labels))}, task=task)
    data = DataFacts(rows, 6, data_format, labels) if rows else None
    return make_plan(loaded, Facts(device, ModelFacts("org/model", "hub", shape), data))


def cpu_plan(method: Any = "lora", *, rows: int = 24, **sections: Any) -> Plan:
    """The plan of a recipe on the tiny Llama."""
    config = json.loads((TINY_LLAMA / "config.json").read_text())
    sections.setdefault("train", {"max_length": 64})
    source = {"base": str(TINY_LLAMA), "method": method, "data": {"train": "x.jsonl"}, **sections}
    loaded = load(source)
    model = ModelFacts(str(TINY_LLAMA), "folder", shape_from_config(config))
    return make_plan(loaded, Facts(CPU, model, DataFacts(rows, 6, "chat")))
