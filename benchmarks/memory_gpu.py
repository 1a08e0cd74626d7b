"""Predicted against measured memory on a CUDA device: random weights, real trainer, no downloads.

    python benchmarks/memory_gpu.py [--only TEXT] [--dry] [--minutes 9]

Needs one GPU. Packages that are missing are installed from a folder `wheels` beside this file, where there
is one. Each cell is traced on shapes alone, then trained for three steps; what torch's allocator had
allocated and reserved at its highest in the last two is compared. `--dry` prints the predictions for an
80 GB H100 without a device. Cells that do not fit the device are skipped and counted as such.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

LLAMA = "meta-llama/Llama-3.1-8B"
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-moe": {  # Qwen3-30B-A3B, 12 of its 48 layers
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "gemma3": {  # Gemma 3 4B's language model: a vocabulary of 262k
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
    },
    "mamba2": {  # Mamba2 1.3B, 12 of its 48 layers
        "model_type": "mamba2",
        "vocab_size": 50288,
        "hidden_size": 2048,
        "num_hidden_layers": 12,
        "state_size": 128,
        "num_heads": 64,
        "head_dim": 64,
        "n_groups": 1,
        "chunk_size": 256,
    },
}


@dataclass(frozen=True)
class Cell:
    """One comparison: `rows` of `length` tokens."""

    model: str
    method: str
    length: int
    checkpointing: str
    rows: int = 1
    attention: str = "auto"

    def __str__(self) -> str:
        size = f"{self.rows} x {self.length}"
        return f"{self.model} | {self.method} | {size} | {self.checkpointing} | {self.attention}"


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 16},
    "lora, attention": {"name": "lora", "rank": 16, "targets": "attention"},
    "qlora": {"name": "qlora", "rank": 16},
    "full": {"name": "full"},
    "prefix": {"name": "prefix", "virtual_tokens": 20},
    "ia3": {"name": "ia3"},
}


def cells() -> list[Cell]:
    """At least 24, the short ones first."""
    llama = [
        *(Cell("llama-8b", "qlora", n, "full") for n in (512, 2048, 8192, 16384)),
        *(Cell("llama-8b", "lora", n, "full") for n in (512, 2048, 8192, 16384)),
        *(Cell("llama-8b", m, 2048, "none") for m in ("qlora", "lora", "ia3", "prefix")),
        Cell("llama-8b", "lora", 2048, "selective"),
        Cell("llama-8b", "qlora", 1024, "full", rows=4),
        Cell("llama-8b", "lora", 1024, "none", attention="eager"),
        Cell("llama-8b", "full", 1024, "full"),
    ]
    gemma = [
        *(Cell("gemma3", m, n, "full") for m in ("qlora", "lora") for n in (512, 2048, 8192)),
        Cell("gemma3", "full", 2048, "full"),
        Cell("gemma3", "ia3", 2048, "none"),
    ]
    experts = [
        Cell("qwen3-moe", "lora, attention", 2048, "none"),
        Cell("qwen3-moe", "lora, attention", 2048, "full"),
        Cell("qwen3-moe", "qlora", 2048, "full"),
    ]
    states = [
        Cell("mamba2", "lora", 512, "none"),
        Cell("mamba2", "lora", 2048, "full"),
        Cell("mamba2", "full", 512, "full"),
    ]
    return sorted([*llama, *gemma, *experts, *states], key=lambda cell: cell.rows * cell.length)


def install_missing() -> None:
    """From wheels beside this file: a lent device may reach no package index."""
    names = ("transformers", "peft", "trl", "bitsandbytes", "pydantic", "ruamel.yaml", "datasets", "psutil")
    missing = [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]
    wheels = HERE / "wheels"
    if missing and wheels.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(wheels)]
        subprocess.run([*command, *missing], check=True)


def planned(cell: Cell, device: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(plan with its traced memory, shape, configuration)."""
    from peftkit.archs import KNOWN, shape_from_config
    from peftkit.plan import Facts, ModelFacts, make_plan
    from peftkit.prepare.traced_memory import trace_memory
    from peftkit.recipe import load

    config = dict(KNOWN[LLAMA]) if cell.model == "llama-8b" else SHAPES[cell.model]
    shape = shape_from_config(config)
    recipe = load(
        {
            "base": {"id": f"org/{cell.model}", "attention": cell.attention},
            "method": METHODS[cell.method],
            "data": {"train": "org/data"},
            "train": {
                "max_length": cell.length,
                "max_steps": 3,
                "micro_batch": cell.rows,
                "batch_size": cell.rows,
                "optimizer": "adamw_torch_fused",
                "gradient_checkpointing": {"none": False, "full": True}.get(cell.checkpointing, cell.checkpointing),
            },
        }
    )
    assert shape is not None
    plan = make_plan(recipe, Facts(device, ModelFacts(f"org/{cell.model}", "hub", shape), None))
    assert plan.batch is not None
    batch = replace(plan.batch, is_padded=False)
    found = trace_memory(plan, shape, config, batch)
    if found.memory is None:
        raise RuntimeError(f"no prediction: {found.reason}")
    return replace(plan, memory=found.memory, batch=batch), shape, config


def compare(cell: Cell, device: Any, *, dry: bool) -> dict[str, Any]:
    """Predicted and, on a device, measured."""
    from peftkit.model.hardware import is_out_of_memory, release_memory
    from peftkit.plan.fit import check_fit
    from peftkit.prepare.measured_memory import measure_memory

    plan, shape, config = planned(cell, device)
    peak = plan.memory.peak
    told = {"cell": str(cell), **asdict(cell), "phase": peak.phase, "components": dict(peak.components)}
    told["predicted_bytes"], told["predicted_reserved_bytes"] = (peak.allocated_bytes, plan.memory.reserved_bytes)
    if dry or check_fit(plan.memory, device).verdict == "does not fit":
        return told if dry else {**told, "skipped": "does not fit this device"}
    try:
        trial = measure_memory(plan, config, plan.batch, vocab=shape.dims.vocab)
    except Exception as error:  # noqa: BLE001  one bad cell must not hide the others
        failed = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"[:200]
        return {**told, "failed": failed}
    finally:
        release_memory()
    return {
        **told,
        **asdict(trial),
        "error_percent": round(trial.error_percent, 3),
        "reserved_error_percent": round(trial.reserved_error_percent or 0.0, 3),
    }


def line_of(found: dict[str, Any]) -> str:
    said = f"predicted {found['predicted_bytes'] / 2**30:7.2f} GiB"
    if "measured_bytes" not in found:
        return f"{found['cell']:58s} {said}  {found.get('skipped') or found.get('failed') or ''}"
    was = f"measured {found['measured_bytes'] / 2**30:7.2f}  {found['error_percent']:+6.2f} %"
    return f"{found['cell']:58s} {said}  {was}  reserved {found['reserved_error_percent']:+6.2f} %"


def summary_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    good = [found for found in results if "measured_bytes" in found]
    if not good:
        return {"num_cells": 0, "num_predicted": len(results)}
    errors = [abs(found["error_percent"]) for found in good]
    return {
        "num_cells": len(good),
        "num_failed": sum("failed" in found for found in results),
        "num_skipped": sum("skipped" in found for found in results),
        "median_error_percent": round(statistics.median(errors), 3),
        "worst_error_percent": max(errors),
        "median_reserved_error_percent": round(
            statistics.median(abs(found["reserved_error_percent"]) for found in good), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cells whose name holds this text")
    parser.add_argument("--dry", action="store_true", help="predictions only, no device")
    parser.add_argument("--minutes", type=float, default=9.0, help="no cell is begun after so long")
    arguments = parser.parse_args()
    install_missing()
    logging.disable(logging.WARNING)

    from common import write_result

    from peftkit.model.hardware import detect_device
    from peftkit.plan.devices import parse_device

    here = detect_device()
    device = parse_device("h100-80gb", here)[0] if arguments.dry else here
    if device.kind != "cuda":
        sys.exit("no CUDA device here: --dry prints the predictions")
    results, started = [], time.monotonic()
    for cell in cells():
        if arguments.only not in str(cell):
            continue
        if time.monotonic() - started > 60 * arguments.minutes:
            print(f"{cell}: not begun, the time is over")
            continue
        results.append(compare(cell, device, dry=arguments.dry))
        print(line_of(results[-1]), flush=True)
    summary = summary_of(results)
    print(json.dumps(summary))
    if not arguments.only:
        name = "memory_gpu_predicted" if arguments.dry else "memory_gpu"
        write_result(name, {"device": device.name, **summary, "cells": results})


if __name__ == "__main__":
    main()
