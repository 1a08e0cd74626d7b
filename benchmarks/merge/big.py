"""A merge of 2.5 GB against PEFT and against copying the base: seconds, memory, and every bit.

    python benchmarks/merge/big.py [--rounds 3]

A random bf16 Llama of 24 layers in 5 shards with an fp32 LoRA of rank 16 on all linear layers. Each way runs
in a process of its own, in turn, and in another order each time. Memory is the peak resident one, less that
of a process that imported torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import median, write_result

LAYERS, HIDDEN, INNER, VOCABULARY = 24, 2048, 5632, 32000
TARGETS = {"against_peft": "at most 0.4", "against_copy": "at most 2", "memory": "at most 1"}


def make_base(folder: Path) -> None:
    """Random weights, written shard by shard by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size="520MB")


def make_adapter(base: Path, folder: Path) -> None:
    """LoRA of rank 16 with random A and B in fp32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape) * 0.01
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder, save_embedding_layers=False)


def ours(base: Path, adapter: Path, out: Path) -> None:
    """peftkit's merge without the comparison of logits, which PEFT does not make either."""
    from peftkit.rundir import publish_folder
    from peftkit.ship.merge.decide import MergeOptions, plan_merge_inputs, write_merge

    work = plan_merge_inputs([adapter], MergeOptions())
    with publish_folder(out, sealed=False) as staging:
        write_merge(work, work.base, staging)


def theirs(base: Path, adapter: Path, out: Path) -> None:
    """PEFT: load, merge, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="520MB")


def idle(base: Path, adapter: Path, out: Path) -> None:
    """An interpreter with torch loaded."""
    import torch

    assert torch.ones(1)


def start(base: Path, adapter: Path, out: Path) -> None:
    """What peftkit does before it reads the first weight: imports, and the plan of the merge."""
    from peftkit.ship.merge.decide import MergeOptions, plan_merge_inputs

    assert plan_merge_inputs([adapter], MergeOptions()).plans


WAYS = {"idle": idle, "start": start, "peftkit": ours, "peft": theirs}


def measured(way: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Seconds and peak bytes of a process of its own."""
    begun = time.monotonic()
    command = [sys.executable, __file__, "--run", way, str(base), str(adapter), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return {"seconds": time.monotonic() - begun, "peak_bytes": float(done.stdout.split()[-1])}


def copied(base: Path, out: Path) -> dict[str, float]:
    """cp -r, until it is on the disk: a merge is over only then, too."""
    begun = time.monotonic()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    cached = time.monotonic() - begun
    for path in out.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return {"seconds": time.monotonic() - begun, "cached_seconds": cached, "peak_bytes": 0.0}


def unlike(one: Path, two: Path) -> tuple[int, int]:
    """(tensors that differ in a bit, tensors)."""
    import torch

    from peftkit.ship.files.tensors import read_all_entries, safetensors_files

    first, second = (read_all_entries(safetensors_files(folder)) for folder in (one, two))
    assert first.keys() == second.keys()
    return sum(not torch.equal(first[n].read(), second[n].read()) for n in first), len(first)


def main() -> None:
    """Make, run in turn, compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        way, *folders = arguments.run
        WAYS[way](*map(Path, folders))
        status = Path("/proc/self/status").read_text().splitlines()
        [line] = [line for line in status if line.startswith("VmHWM")]
        print(int(line.split()[1]) * 1024)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base, adapter = folder / "base", folder / "adapter"
        make_base(base)
        make_adapter(base, adapter)
        found: dict[str, list[dict[str, float]]] = {}
        counts: tuple[int, int] = (0, 0)
        for number in range(arguments.rounds):
            ways = ["copy", *WAYS]
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                out = folder / f"{way}-{number}"
                os.sync()
                one = copied(base, out) if way == "copy" else measured(way, base, adapter, out)
                found.setdefault(way, []).append(one)
                print(way, f"{one['seconds']:.1f} s, {one['peak_bytes'] / 2**20:,.0f} MiB", flush=True)
            if number == 0:
                counts = unlike(folder / "peftkit-0", folder / "peft-0")
            for way in ("copy", "peftkit", "peft"):
                shutil.rmtree(folder / f"{way}-{number}")
        write_result("merge_big", summary(found, counts, base))


def summary(found: dict[str, list[dict[str, float]]], counts: tuple[int, int], base: Path) -> dict[str, Any]:
    """Medians, ratios and targets."""
    seconds = {way: median([one["seconds"] for one in all_]) for way, all_ in found.items()}
    peaks = {way: median([one["peak_bytes"] for one in all_]) for way, all_ in found.items()}
    largest = VOCABULARY * HIDDEN * 2
    above = peaks["peftkit"] - peaks["idle"]
    result = {
        "base_bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
        "seconds": seconds,
        "peak_bytes": peaks,
        "above_idle_bytes": above,
        "allowed_bytes": 3 * largest + 200 * 10**6,
        "different_tensors": counts[0],
        "tensors": counts[1],
        "ratios": {
            "against_peft": seconds["peftkit"] / seconds["peft"],
            "against_copy": seconds["peftkit"] / seconds["copy"],
            "memory": above / (3 * largest + 200 * 10**6),
        },
        "targets": TARGETS,
    }
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
