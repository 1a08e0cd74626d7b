"""The step of two processes beside that of one, in peftkit and in a script written by hand for accelerate.

    python benchmarks/scale.py [--pairs 3] [--steps 30]

The same model (15M Llama), LoRA of rank 16 on all linears, rows of 64 tokens, 8 a step in micro-batches of 2, one
thread a process. Printed: the median step of each, ratios in pairs, and the bytes sent over the loopback, by step:
the base's weights are in them, which DDP sends once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import median, write_result
from floor import ROOT, make_model

BATCH, MICRO, LENGTH, RANK = 8, 2, 64, 16
RECIPE = {
    "method": {"name": "lora", "rank": RANK, "targets": "all-linear"},
    "train": {
        **{"batch_size": BATCH, "micro_batch": MICRO, "max_length": LENGTH},
        **{"learning_rate": 2e-4, "checkpoint_steps": 10_000, "gradient_checkpointing": False, "packing": False},
    },
    "diagnose": {"escalate": "off"},
}


def loopback_bytes() -> int:
    """Return the bytes that went over the loopback since the machine started."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def by_hand(model_folder: str, rows_file: str, num_steps: int, out: str) -> None:
    """Train as a careful user of accelerate would: this process's micro-batches, gradients added up once a step."""
    import torch
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, set_seed

    torch.set_num_threads(1)
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    texts = [json.loads(line)["text"] for line in Path(rows_file).read_text(encoding="utf-8").splitlines()]
    rows = [tokenizer(text)["input_ids"][-LENGTH:] for text in texts]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    sent = loopback_bytes()
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = get_scheduler("cosine", optimizer, 2, num_steps)
    num_ranks, rank = accelerator.num_processes, accelerator.process_index
    num_passes = BATCH // MICRO // num_ranks
    num_tokens, times = BATCH * (LENGTH - 1), []
    model.train()
    for step in range(num_steps):
        started = time.perf_counter()
        for number in range(num_passes):
            first = step * BATCH + (number * num_ranks + rank) * MICRO
            ids = torch.tensor([rows[(first + i) % len(rows)] for i in range(MICRO)])
            is_last = number == num_passes - 1
            with accelerator.no_sync(model) if not is_last else accelerator.accumulate(model):
                logits = model(input_ids=ids).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum"
                )
                accelerator.backward(loss * num_ranks / num_tokens)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    if rank == 0:
        Path(out).write_text(json.dumps({"times": times, "sent": loopback_bytes() - sent}))


def run(command: list[str], num: int) -> None:
    """Run a command in `num` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num)] if num > 1 else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    arguments = [sys.executable, *launcher, *command]
    result = subprocess.run(arguments, check=False, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])


def main() -> None:
    if sys.argv[1:2] == ["by-hand"]:
        by_hand(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    sent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        rows = folder / "rows.jsonl"
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        rows.write_text("".join(json.dumps({"text": text[i * 40 : i * 40 + 900]}) + "\n" for i in range(64)))
        for pair in range(asked.pairs):
            for num in (1, 2):
                recipe: dict[str, Any] = {**RECIPE, "base": str(model)}
                recipe["data"] = {"train": str(rows), "eval": None, "truncation": "keep_end"}
                recipe["data"]["waive"] = ["duplicates", "near-duplicates", "cut-answers"]
                recipe["train"] = {**RECIPE["train"], "max_steps": asked.steps}
                file, out = folder / f"recipe-{pair}-{num}.yaml", folder / f"run-{pair}-{num}"
                file.write_text(json.dumps(recipe))
                before = loopback_bytes()
                run(["-m", "peftkit", "finetune", str(file), "--out", str(out)], num)
                sent.setdefault(f"peftkit {num}", []).append((loopback_bytes() - before) / asked.steps)
                events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
                times = [event["step_seconds"] for event in events if event["event"] == "step"][5:]
                seconds.setdefault(f"peftkit {num}", []).append(median(times))
                made = folder / f"hand-{pair}-{num}.json"
                run([__file__, "by-hand", str(model), str(rows), str(asked.steps), str(made)], num)
                line = json.loads(made.read_text())
                seconds.setdefault(f"by hand {num}", []).append(median(line["times"][5:]))
                sent.setdefault(f"by hand {num}", []).append(line["sent"] / asked.steps)
        adapter_bytes = 4 * next(event["num_trainable"] for event in events if event["event"] == "parameters")
    ratios = {
        f"{a} / {b}": [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        for a, b in (
            ("peftkit 2", "by hand 2"),
            ("peftkit 1", "by hand 1"),
            ("peftkit 2", "peftkit 1"),
            ("by hand 2", "by hand 1"),
        )
    }
    for who, values in seconds.items():
        print(f"{who}: {1000 * median(values):.1f} ms a step, {median(sent[who]) / 1e6:.2f} MB sent")
    for what, values in ratios.items():
        print(f"{what}: {median(values):.3f}  ({', '.join(f'{value:.3f}' for value in values)})")
    print(f"gradients of the adapter: {adapter_bytes / 1e6:.2f} MB")
    result = {"seconds": seconds, "sent_bytes": sent, "ratios": ratios, "adapter_bytes": adapter_bytes}
    print(write_result("scale", result).relative_to(ROOT))


if __name__ == "__main__":
    main()
