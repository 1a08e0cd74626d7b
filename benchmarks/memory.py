"""Predicted against real peak memory of a training step, on this machine's CPU.

    python benchmarks/memory.py [--only TEXT] [--out FILE]

Each cell saves a random model of a few million parameters, loads it, attaches the adapter and trains two
steps with the real trainer. The second step runs under torch's profiler, whose memory events are those of
the CPU allocator; their highest sum is compared with what the plan's trace predicts. Neither side knows the
other.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from common import write_result  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import AutoConfig, PreTrainedTokenizerFast, TrainerCallback  # noqa: E402

from peftkit.archs import shape_from_config  # noqa: E402
from peftkit.data.tokens.mask import Tokenized  # noqa: E402
from peftkit.model.adapter import attach as adapter  # noqa: E402
from peftkit.model.base.unknown_family import AUTO_CLASSES  # noqa: E402
from peftkit.model.hardware import allocator_peak  # noqa: E402
from peftkit.model.load import load_model  # noqa: E402
from peftkit.plan import DataFacts, DeviceFacts, Facts, ModelFacts, Plan, make_plan  # noqa: E402
from peftkit.plan.plan import Batch  # noqa: E402
from peftkit.recipe import load  # noqa: E402
from peftkit.train.batches import build_train_dataset  # noqa: E402
from peftkit.train.trainer import build_trainer  # noqa: E402

VOCAB, LENGTH, ROWS = 2048, 256, 2
DEVICE = DeviceFacts("cpu", "a CPU", 24 * 2**30, True, True)
WIDE = {"vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 512}
HEADS = {"num_attention_heads": 8, "intermediate_size": 704}
GQA = {**WIDE, **HEADS, "num_key_value_heads": 2}
MHA = {**WIDE, **HEADS, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 128},
    "qwen3": {**GQA, "head_dim": 32},
    "gemma2": {**GQA, "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {**GQA, "head_dim": 32, "sliding_window": 128},
    "phi3": {**MHA, "pad_token_id": 0},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 512},
    "gpt_neox": {**WIDE, **HEADS},
    "falcon": {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": 256, "n_layer": 4, "n_head": 8},
    "mixtral": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
    "mamba": {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "state_size": 16,
        "num_heads": 8,
        "head_dim": 32,
        "n_groups": 1,
        "chunk_size": 64,
    },
    "t5": {
        "vocab_size": VOCAB,
        "d_model": 256,
        "d_kv": 32,
        "d_ff": 704,
        "num_layers": 4,
        "num_heads": 8,
        "decoder_start_token_id": 0,
    },
    "bert": {**WIDE, **HEADS},
}
LORA = {"name": "lora", "rank": 8, "targets": "all-linear"}
METHODS: dict[str, Any] = {
    "lora": LORA,
    "lora, attention": {**LORA, "targets": "attention"},
    "lora, dropout": {**LORA, "dropout": 0.1},
    "dora": {**LORA, "dora": True},
    "qlora": {**LORA, "name": "qlora"},
    "full": {"name": "full"},
    "prefix": {"name": "prefix", "virtual_tokens": 20},
    "prompt": {"name": "prompt", "virtual_tokens": 20},
    "ia3": {"name": "ia3"},
    "vera": {"name": "vera"},
    "oft": {"name": "oft"},
    "ln": {"name": "ln"},
    "adalora": {"name": "adalora", "initial_rank": 12, "rank": 8},
}


@dataclass(frozen=True)
class Cell:
    """One comparison. `rows` of `length` tokens; with `padded`, the second row is shorter."""

    model: str = "llama"
    method: str = "lora"
    checkpointing: str = "none"
    attention: str = "auto"
    precision: str = "fp32"
    optimizer: str = "adamw_torch"
    padded: bool = False
    accumulation: int = 1
    task: str = "causal-lm"
    packed: bool = False

    def __str__(self) -> str:
        extra = [self.checkpointing, self.attention, self.precision, self.optimizer]
        extra += ["padded"] * self.padded + ["packed"] * self.packed
        extra += [f"accumulation {self.accumulation}"] * (self.accumulation > 1)
        return f"{self.model} | {self.method} | {' | '.join(extra)}"


def cells() -> list[Cell]:
    """At least 60 cells over families, methods, checkpointing, attention, type, optimizer and padding."""
    llama = [
        Cell(method=method, checkpointing=c, attention=a)
        for method in ("lora", "full", "qlora")
        for c in ("none", "selective", "full")
        for a in ("sdpa", "eager")
    ]
    methods = [Cell(method=m) for m in METHODS if m not in {"lora", "full", "qlora"}]
    methods += [Cell(method=m, checkpointing="full") for m in ("ia3", "dora", "lora, dropout", "vera", "oft", "ln")]
    types = [
        Cell(method=m, precision="bf16", checkpointing=c) for m in ("lora", "full", "qlora") for c in ("none", "full")
    ]
    autocast = [
        Cell(method=m, precision=p, checkpointing=c)
        for m in ("lora", "full", "qlora")
        for p, c in (("autocast", "none"), ("autocast", "full"))
    ]
    optimizers = [
        Cell(method=m, optimizer=o) for m in ("lora", "full") for o in ("adafactor", "sgd", "schedule_free_adamw")
    ]
    padding = [
        Cell(method=m, padded=True, checkpointing=c, attention=a)
        for m, c, a in (
            ("lora", "none", "sdpa"),
            ("lora", "full", "sdpa"),
            ("full", "none", "eager"),
            ("qlora", "full", "sdpa"),
        )
    ]
    accumulation = [Cell(method=m, accumulation=2) for m in ("lora", "full")]
    packing = [
        Cell(model=name, packed=True, checkpointing=c, attention=a)
        for name, c, a in (
            ("llama", "none", "sdpa"),
            ("llama", "full", "sdpa"),
            ("llama", "none", "eager"),
            ("gpt2", "none", "sdpa"),
            ("gemma3_text", "none", "sdpa"),
        )
    ]
    tasks = {"t5": "seq2seq", "bert": "classification"}
    families = [
        Cell(model=name, method=m, checkpointing=c, task=tasks.get(name, "causal-lm"))
        for name in MODELS
        if name != "llama"
        for m, c in (("lora", "none"), ("full", "full"))
    ]
    return llama + methods + types + autocast + optimizers + padding + packing + accumulation + families


def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def rows_for(cell: Cell) -> list[Tokenized]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(ROWS * 2 * cell.accumulation):
        length = LENGTH - 56 if cell.padded and number % 2 else LENGTH
        ids = torch.randint(4, VOCAB, (length,), generator=generator).tolist()
        labels = {"classification": [number % 2], "seq2seq": ids[: LENGTH // 4]}.get(cell.task, list(ids))
        if cell.packed:  # two documents to a pack, the shorter one first
            found.append(Tokenized(ids[: LENGTH // 4], labels[: LENGTH // 4], f"{number} a"))
            ids, labels = ids[LENGTH // 4 :], labels[LENGTH // 4 :]
        found.append(Tokenized(ids, labels, str(number)))
    return found


def plan_of(cell: Cell, config: dict[str, Any], folder: str) -> Plan:
    labels = ("a", "b") if cell.task == "classification" else ()
    recipe = load(
        {
            "base": {"id": folder, "attention": cell.attention},
            "method": METHODS[cell.method],
            "data": {"train": "x.jsonl"},
            "train": {
                "max_length": LENGTH,
                "max_steps": 4 if cell.method == "adalora" else 2,  # PEFT prunes earlier ones at once
                "micro_batch": ROWS,
                "batch_size": ROWS * cell.accumulation,
                "optimizer": cell.optimizer,
                "packing": cell.packed,
                "precision": "bf16" if cell.precision == "autocast" else cell.precision,
                "gradient_checkpointing": {"none": False, "full": True}.get(cell.checkpointing, cell.checkpointing),
            },
        }
    )
    shape = shape_from_config(config, task=cell.task)
    assert shape is not None
    data = DataFacts(64, 0, "prompt-completion", labels)
    plan = make_plan(recipe, Facts(DEVICE, ModelFacts(folder, "folder", shape), data))
    if cell.precision == "autocast":  # what a GPU would do, on the CPU
        dtype = "float32" if cell.method == "full" else "bfloat16"
        base = replace(plan.base, dtype=dtype)
        return replace(plan, base=base, train=replace(plan.train, autocast="bf16"))
    return plan


class Measure(TrainerCallback):
    """Profiles the memory of the second step."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.profile: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.profile is not None:
            self.profile.__exit__(None, None, None)
            self.peak_bytes, self.profile = allocator_peak(self.profile), None


def measured(cell: Cell, plan: Plan, folder: str, output: Path) -> int:
    """Bytes by which the real second step rises above what lay there before it."""
    model = adapter.attach_adapter(load_model(folder, plan.base, device="cpu"), plan, tokenizer())
    watch = Measure()
    drawn = build_train_dataset(plan, rows_for(cell), 0)
    trainer = build_trainer(model, plan, tokenizer(), train=drawn, output_dir=output, callbacks=[watch], optimizer=None)
    trainer.train()
    return watch.peak_bytes


def run(cell: Cell) -> dict[str, Any]:
    import transformers

    from peftkit.prepare.traced_memory import trace_plan

    logging.disable(logging.WARNING)
    config = AutoConfig.for_model(cell.model, **MODELS[cell.model], bos_token_id=1, eos_token_id=2)
    config.update({k: 0.0 for k in config.to_dict() if "dropout" in k or k.endswith("_pdrop")})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        made = getattr(transformers, AUTO_CLASSES[cell.task]).from_config(config)  # type: ignore[index]
        made.save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        plan = plan_of(cell, {**saved, "num_labels": 2}, str(folder))
        learnt = ROWS * (LENGTH - 1 - cell.packed) - (56 if cell.padded else 0)
        batch = Batch(ROWS, LENGTH, LENGTH // 4 if cell.task == "seq2seq" else 0, learnt, cell.padded)
        batch = replace(batch, is_packed=cell.packed)
        started = time.perf_counter()
        found = trace_plan(plan, saved, batch)
        seconds = time.perf_counter() - started
        real = measured(cell, plan, str(folder), Path(name))
    steps = [found.peaks[phase] for phase in ("forward", "backward", "optimizer step")]
    peak = max(steps, key=lambda s: s.allocated_bytes)
    static = found.static_bytes
    predicted = peak.allocated_bytes - static
    return {
        "cell": str(cell),
        **asdict(cell),
        "phase": peak.phase,
        "predicted_bytes": predicted,
        "measured_bytes": real,
        "static_bytes": static,
        "error_percent": round(100 * (predicted - real) / real, 3),
        "error_of_total_percent": round(100 * (predicted - real) / (real + static), 3),
        "trace_seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cells whose name holds this text")
    parser.add_argument("--out", default="memory")
    arguments = parser.parse_args()
    chosen = [cell for cell in cells() if arguments.only in str(cell)]
    results = []
    for cell in chosen:
        try:
            found = run(cell)
        except Exception as error:  # noqa: BLE001  one bad cell must not hide the others
            print(f"{cell}: FAILED {type(error).__name__}: {str(error)[:200]}", flush=True)
            results.append({"cell": str(cell), "failed": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        results.append(found)
        print(
            f"{found['cell']:70s} {found['phase']:15s} "
            f"predicted {found['predicted_bytes'] / 2**20:8.1f} MiB  "
            f"measured {found['measured_bytes'] / 2**20:8.1f} MiB  {found['error_percent']:+7.2f} %",
            flush=True,
        )
    good = [r for r in results if "failed" not in r]
    errors = [abs(r["error_percent"]) for r in good]
    if errors:
        summary = {
            "num_cells": len(good),
            "num_failed": len(results) - len(good),
            "median_error_percent": round(statistics.median(errors), 3),
            "worst_error_percent": max(errors),
            "most_under_percent": min(r["error_percent"] for r in good),
        }
        print(json.dumps(summary))
        if not arguments.only:
            write_result(arguments.out, {**summary, "cells": results})


if __name__ == "__main__":
    main()
