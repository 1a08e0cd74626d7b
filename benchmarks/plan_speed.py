"""How fast `peftkit plan` answers: light, traced afresh, from the cache, and for the largest models.

    python benchmarks/plan_speed.py

Each number is a process of its own, with its peak resident memory; the floor is a process that imports the
libraries that a trace needs. Traces go to a temporary cache.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import median, write_result

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "recipes" / "qlora-llama8b.yaml")
LIBRARIES = "import torch, transformers, peft, trl, bitsandbytes; from trl import SFTTrainer"
LLAMA_405B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
WARM = """
import sys, time
from peftkit.prepare.plan_report import plan_report
from peftkit.recipe import load
import trl, bitsandbytes
from trl import SFTTrainer
plan_report(load(sys.argv[1], ["train.max_length=64", "train.micro_batch=1"]), gpu="h100-80gb", trace=True)
started = time.perf_counter()
plan_report(load(sys.argv[1], ["train.micro_batch=2"]), gpu="h100-80gb", trace=True)
print(time.perf_counter() - started)
"""


def timed(command: list[str], cache: str) -> tuple[float, str]:
    started = time.perf_counter()
    environment = {**os.environ, "PEFTKIT_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "problem" in done.stderr or done.returncode not in {0, 2}:  # 2: it does not fit, which is an answer
        raise RuntimeError(done.stderr[-500:])
    return time.perf_counter() - started, done.stdout


def plan(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "peftkit", "plan", *arguments]


def main() -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        big = Path(name) / "405b"
        big.mkdir()
        (big / "config.json").write_text(json.dumps(LLAMA_405B))
        rows: dict[str, list[str]] = {
            "the interpreter and the libraries": [sys.executable, "-c", LIBRARIES],
            "light, 8B": plan(RECIPE, "--gpu", "h100-80gb"),
            "traced, 8B": plan(RECIPE, "--gpu", "h100-80gb", "--trace"),
            "traced, 8B, from the cache": plan(RECIPE, "--gpu", "h100-80gb", "--trace"),
            "traced, 405B": plan(RECIPE, f"base.id={big}", "--gpu", "b200", "--trace"),
            "traced, 256 experts (DeepSeek-V3)": plan(
                RECIPE, "base.id=deepseek-ai/DeepSeek-V3", "method.targets=attention", "--gpu", "b200", "--trace"
            ),
        }
        for label, command in rows.items():
            repeats = 3 if label.startswith(("light", "the")) or "cache" in label else 1
            seconds = median([timed(command, name)[0] for _ in range(repeats)])
            found[label] = round(seconds, 2)
            print(f"{label:40s} {seconds:6.2f} s", flush=True)
        _, told = timed([sys.executable, "-c", WARM, RECIPE], name)
        found["traced, 8B, libraries loaded"] = round(float(told), 2)
        print(f"{'traced, 8B, libraries loaded':40s} {float(told):6.2f} s")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{'peak resident memory of any':40s} {peak / 2**20:6.0f} MiB")
    write_result("plan_speed", {"seconds": found, "peak_resident_bytes": peak})


if __name__ == "__main__":
    main()
