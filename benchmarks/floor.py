"""peftkit against a hand-written TRL + PEFT script: the same model, data and steps, run in turn.

    python benchmarks/floor.py [--pairs 5] [--steps 40]

Measured from outside: seconds from the command to the first training step, peak resident memory of the
process. Measured inside: tokens per second from step 5 to the last.
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

from common import median, write_result

ROOT = Path(__file__).parent.parent
DATA = ROOT / "recipes" / "data" / "banking77-10.train.jsonl"
TARGETS = {"first_step_seconds": "at most 1.1", "tokens_per_second": "at least 0.98", "peak_bytes": "at most 1.05"}
RECIPE = """\
base: {model}
method: {{name: lora, rank: 16, targets: all-linear}}
data: {{train: {data}, eval: null}}
train: {{max_steps: {steps}, batch_size: 8, micro_batch: 8, learning_rate: 2.0e-4, max_length: 256,
  checkpoint_steps: 1000, gradient_checkpointing: false, precision: fp32}}
"""


def make_model(folder: Path) -> Path:
    """A random Llama of about 15M parameters with the tiny model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "assets" / "tiny-llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def watch(command: list[str]) -> tuple[float, int]:
    """(seconds to the first step, peak resident bytes) of a command that prints 'step 1/' when it is done."""
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    first, said = None, []
    for line in process.stdout:
        said.append(line)
        if first is None and line.startswith("step 1/"):
            first = time.perf_counter() - started
    _, status, usage = os.wait4(process.pid, 0)
    if status or first is None:
        raise SystemExit("".join(said[-20:]))
    return first, usage.ru_maxrss * 1024


def steady(records: list[dict[str, float]]) -> float:
    """Tokens per second from step 5 to the last."""
    start, end = records[4], records[-1]
    return (end["tokens"] - start["tokens"]) / (end["at"] - start["at"])


def peftkit_records(run: Path) -> list[dict[str, float]]:
    tokens, records = 0.0, []
    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            tokens += event["tokens_per_second"] * event["step_seconds"]
            records.append({"at": event["at_seconds"], "tokens": tokens})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"peftkit": [], "floor": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=model, data=DATA, steps=options.steps))
        for pair in range(options.pairs + 1):  # the first pair warms the disk cache and is not counted
            run, out = folder / f"run-{pair}", folder / f"floor-{pair}.json"
            ours = watch([sys.executable, "-m", "peftkit", "finetune", str(recipe), "--out", str(run)])
            theirs = watch(
                [
                    sys.executable,
                    str(ROOT / "benchmarks" / "floor_trl.py"),
                    str(model),
                    str(DATA),
                    str(options.steps),
                    str(out),
                ]
            )
            if pair == 0:
                continue
            for key, (first, peak), records in (
                ("peftkit", ours, peftkit_records(run)),
                ("floor", theirs, json.loads(out.read_text())),
            ):
                found[key].append(
                    {"first_step_seconds": first, "peak_bytes": peak, "tokens_per_second": steady(records)}
                )
    ratios = {}
    for key, target in TARGETS.items():
        pairs = [a[key] / b[key] for a, b in zip(found["peftkit"], found["floor"], strict=True)]
        ratios[key] = {"median": median(pairs), "pairs": pairs, "target": target}
        ours, theirs = (median([row[key] for row in found[who]]) for who in ("peftkit", "floor"))
        print(f"{key:<20} peftkit {ours:,.2f}  floor {theirs:,.2f}  ratio {median(pairs):.3f}  ({target})")
    print(write_result("floor", {"steps": options.steps, "measured": found, "ratios": ratios}).relative_to(ROOT))


if __name__ == "__main__":
    main()
