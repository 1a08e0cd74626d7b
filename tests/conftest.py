"""Shared fixtures: the tiny pretrained model, small data files, recipes as dicts, and made-up devices."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# beside other work a machine is slow, which is no fault of what is tested
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent
TINY_LLAMA = Path(__file__).parent / "assets" / "tiny-llama"


_FROZEN = {"modules": 0}


@pytest.fixture(autouse=True)
def _one_thread_and_little_garbage() -> None:
    """Two workers with two threads each would wait for each other.

    And each training collects garbage three times: the million objects of the libraries need no second look.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if len(sys.modules) > _FROZEN["modules"] + 300:
        gc.collect()
        gc.freeze()
        _FROZEN["modules"] = len(sys.modules)


@pytest.fixture(autouse=True)
def _looks_fail_aloud(request: pytest.FixtureRequest) -> Iterator[None]:
    """A diagnosis that raises costs a run its verdict and nothing else; a test must not pass by that."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder is not None and request.node.get_closest_marker("failing_look") is None:
        for file in folder.glob("**/events.jsonl"):
            assert "the diagnosis failed (" not in file.read_text(errors="replace"), file


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Conversions go to a folder of this test session unless one is given."""
    os.environ.setdefault("PEFTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """24 short chats that a tiny model can learn."""
    words = ("alpha", "beta", "gamma", "delta")
    rows = [chat(f"Say {words[i % 4]} number {i}", f"{words[i % 4]} {words[i % 4]}") for i in range(24)]
    return write_jsonl(tmp_path / "chats.jsonl", rows)


@pytest.fixture
def recipe(chats: Path) -> dict[str, Any]:
    """A complete recipe on the tiny model; tests change what they are about."""
    return {
        "base": str(TINY_LLAMA),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(chats), "eval": "25%"},
        "train": {
            "max_steps": 6,
            "batch_size": 4,
            "micro_batch": 2,
            "max_length": 64,
            "eval_steps": 3,
            "learning_rate": 1e-3,
        },
    }


@pytest.fixture
def h100() -> Any:
    from peftkit.plan import DeviceFacts

    return DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", 85_000_000_000, True, True)


@pytest.fixture
def cpu() -> Any:
    from peftkit.plan import DeviceFacts

    return DeviceFacts("cpu", "a CPU", 24 * 2**30, True, True)


def save_tiny(folder: Path, model_type: str, task: str = "causal-lm", **changes: Any) -> tuple[Path, Any]:
    """(folder with the tiny model's weights, its configuration as a dict)."""
    from tests.rigs.tiny import tiny_model

    model = tiny_model(model_type, task, **changes)
    model.save_pretrained(folder / "base", safe_serialization=True)
    return folder / "base", json.loads((folder / "base" / "config.json").read_text())
