"""Predicted peak GPU memory of four runs: peftkit's beside that of other published estimators.

    python benchmarks/estimators.py

Every run is Llama-3.1-8B at 2048 tokens with AdamW in bf16 on an 80 GB H100. The others are installed into
a temporary virtual environment and called through their public functions with the same values; none sees a
network. These are predictions: nothing here is measured, so this tells who differs and why, not who is right.

Two numbers each: `tensors` is the sum without what an estimator adds for allocator, context and safety,
`total` is what it tells its user. For peftkit these are `allocated_bytes` and `needed_bytes`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
LENGTH, RANK = 2048, 16
MODEL = "meta-llama/Llama-3.1-8B"
PARAMETERS = 8_030_261_248
CONFIG: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
PINS = ("fitcheck-llm==0.3.1", "canifinetune==0.4.1", "ftuneai==0.4.1", "ml-memguard==0.5.0")
# DeepSpeed asks for torch, which it finds in the project's own interpreter.
NO_DEPS = ("deepspeed==0.19.8", "hjson", "msgpack", "einops", "py-cpuinfo", "psutil", "ninja")
ONLY_FULL = "It counts full training only: it has no input for adapters or a 4-bit base."


@dataclass(frozen=True)
class Cell:
    name: str
    method: str
    batch: int
    checkpointing: bool

    @property
    def is_qlora(self) -> bool:
        return self.method == "qlora"

    @property
    def is_full(self) -> bool:
        return self.method == "full"


CELLS = (Cell("A", "qlora", 1, True), Cell("B", "qlora", 4, True), Cell("C", "lora", 1, False))
CELLS += (Cell("D", "full", 1, True),)
Found = dict[str, Any]  # tensors_gib, total_gib, and what they are made of; or `none`, the reason


def found(total: float, tensors: float | None, parts: Mapping[str, float], **more: Any) -> Found:
    """Sizes in GiB, rounded."""
    rounded = {name: round(size, 3) for name, size in parts.items() if size}
    told = {"tensors_gib": tensors if tensors is None else round(tensors, 3), "total_gib": round(total, 3)}
    return {**told, **more, "parts_gib": rounded}


def fitcheck(cell: Cell, state_dtype: str = "") -> Found:
    from fitcheck import ModelConfig, TrainingConfig, estimate, get_gpu
    from fitcheck.memory.lora import LORA_TARGETS_FULL

    c = CONFIG
    heads, width = c["num_attention_heads"], c["hidden_size"]
    shape = ModelConfig(
        MODEL, PARAMETERS, width, c["num_hidden_layers"], heads, c["num_key_value_heads"],
        c["intermediate_size"], c["vocab_size"], width // heads, c["tie_word_embeddings"],
    )  # fmt: skip
    state_dtype = state_dtype or ("bf16" if cell.is_full else "fp32")  # AdamW's states are as what is trained
    training = TrainingConfig(
        precision="bf16",
        quantization="nf4" if cell.is_qlora else "none",
        double_quant=cell.is_qlora,
        optimizer="adamw",
        optimizer_dtype=state_dtype,
        batch_size=cell.batch,
        seq_len=LENGTH,
        lora_rank=None if cell.is_full else RANK,
        lora_targets=list(LORA_TARGETS_FULL),
        grad_checkpoint=cell.checkpointing,
        flash_attn=True,
    )
    told = estimate(shape, training, get_gpu("h100-80"))
    parts = {
        name: getattr(told, f"{name}_mib") / 1024
        for name in ("weight", "lora", "optimizer", "gradient", "activation", "overhead")
    }
    return found(told.total_mib / 1024, sum(parts.values()) - parts["overhead"], parts, states=state_dtype)


def canifinetune(cell: Cell) -> Found:
    from canifinetune.estimator import EstimateRequest, estimate

    request = EstimateRequest(
        model_id=MODEL,
        gpu_vram_gb=80,
        method=cell.method,
        seq_len=LENGTH,
        micro_batch_size=cell.batch,
        base_dtype="bf16",
        optimizer="adamw_torch",
        gradient_checkpointing=cell.checkpointing,
        lora_rank=RANK,
        lora_target_scope="all_linear",
        use_network=False,
        override={**CONFIG, "total_params": PARAMETERS, "family": "llama"},
    )
    sizes = estimate(request).memory.model_dump()
    total = sizes.pop("total_estimated_gb")
    parts = {name.removesuffix("_gb"): size for name, size in sizes.items() if name.endswith("_gb")}
    return found(total, total - parts["cuda_overhead"] - parts["safety_margin"], parts)


def ftuneai(cell: Cell) -> Found:
    from ftuneai import Estimator

    told = Estimator(
        model=MODEL,
        method=cell.method,
        quantization="4bit" if cell.is_qlora else "none",
        batch_size=cell.batch,
        seq_length=LENGTH,
        gradient_checkpointing=cell.checkpointing,
        optimizer="adamw",
        lora_rank=RANK,
        lora_target="all_linear",
        flash_attention=True,
    ).estimate_memory()
    parts = {n.removesuffix("_gb"): v for n, v in asdict(told).items() if n.endswith("_gb")}
    total = parts.pop("total")
    return found(total, total - parts["overhead"], parts, parameters=told.total_params)


def memguard(cell: Cell) -> Found:
    from memory_guard.estimator import FinetuneMethod, ModelSpec, TrainSpec, estimate_training_memory

    c = CONFIG
    spec = ModelSpec(
        params=PARAMETERS,
        hidden_dim=c["hidden_size"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        num_layers=c["num_hidden_layers"],
        intermediate_dim=c["intermediate_size"],
        bits=4 if cell.is_qlora else 16,
    )
    training = TrainSpec(
        method=FinetuneMethod(cell.method),
        batch_size=cell.batch,
        seq_length=LENGTH,
        lora_rank=RANK,
        lora_layers=c["num_hidden_layers"],
        lora_targets=7,
        optimizer="adamw",
        grad_checkpoint=cell.checkpointing,
        qlora_double_quant=cell.is_qlora,
    )
    told = estimate_training_memory(spec, training)
    parts = {n.removesuffix("_mb"): v / 1024 for n, v in vars(told).items() if n.endswith("_mb")}
    total = parts.pop("total")
    return found(total, total - parts["overhead"], parts)


def accelerate(cell: Cell) -> Found:
    """What `accelerate estimate-memory` computes; the command itself asks the hub first."""
    if not cell.is_full:
        return {"none": ONLY_FULL}
    import torch
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel, LlamaConfig

    with init_empty_weights():
        model = AutoModel.from_config(LlamaConfig(**CONFIG), dtype=torch.float32)
    size, _ = calculate_maximum_sizes(model)
    sizes = estimate_training_usage(size, "float16")
    parts = {name: num / GIB for name, num in sizes.items()}
    return found(max(parts.values()), max(parts.values()), parts, parameters=size // 4)


def deepspeed(stage: int) -> Callable[[Cell], Found]:
    def estimate(cell: Cell) -> Found:
        if not cell.is_full:
            return {"none": ONLY_FULL}
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

        if stage == 2:
            size = zero2(PARAMETERS, 1, 1, cpu_offload=False)[1]
        else:
            largest = CONFIG["vocab_size"] * CONFIG["hidden_size"]
            size = zero3(PARAMETERS, largest, 1, 1, cpu_offload=False, cpu_offload_params=False)[1]
        return found(size / GIB, size / GIB, {"model states": size / GIB})

    return estimate


def recipe_of(cell: Cell, precision: str) -> dict[str, Any]:
    adapter = {} if cell.is_full else {"rank": RANK, "targets": "all-linear"}
    return {
        "base": MODEL,
        "method": {"name": cell.method, **adapter},
        "data": {"train": "org/x"},  # not read: every row is taken to have max_length tokens
        "train": {
            "max_length": LENGTH,
            "max_steps": 10,
            "micro_batch": cell.batch,
            "batch_size": cell.batch,
            "gradient_checkpointing": cell.checkpointing,
            "precision": precision,
            "optimizer": "adamw_torch",
        },
    }


def peftkit(depth: str, precision: str = "bf16") -> Callable[[Cell], Found]:
    """peftkit's closed form, or its trace."""

    def estimate(cell: Cell) -> Found:
        from peftkit.prepare.plan_report import plan_report
        from peftkit.recipe import load

        loaded = load(recipe_of(cell, precision))
        told = plan_report(loaded, gpu="h100-80gb", trace=depth == "trace")
        plan, memory, peak = told.plan, told.memory, told.memory.peak
        asked = {"trace": "traced"}.get(depth, "closed form")
        if memory.depth != asked:
            return {"none": f"No {depth}: {told.assumptions[-1]}"}
        held = {"weights": plan.base.dtype, "autocast": plan.train.autocast, "parameters": told.num_parameters}
        parts, total = peak.components, memory.needed_bytes
        phase, tensors = peak.phase, peak.allocated_bytes
        sizes = {name: size / GIB for name, size in parts.items()}
        return found(total / GIB, tensors / GIB, sizes, phase=phase, **held)

    return estimate


OWN: dict[str, Callable[[Cell], Found]] = {
    "peftkit, closed form": peftkit("closed form"),
    "peftkit, trace": peftkit("trace"),
}
HERE: dict[str, Callable[[Cell], Found]] = {  # need torch: they run in the project's own interpreter
    "accelerate estimate-memory": accelerate,
    "deepspeed zero2": deepspeed(2),
    "deepspeed zero3": deepspeed(3),
}
THERE: dict[str, Callable[[Cell], Found]] = {
    "fitcheck-llm": fitcheck,
    "canifinetune": canifinetune,
    "ftuneai": ftuneai,
    "ml-memguard": memguard,
}
# The same cell where another value of an input, or a default, could have been meant.
VARIANTS: dict[str, Callable[[Cell], Found]] = {
    "fitcheck-llm, its default of fp32 states": lambda cell: fitcheck(cell, "fp32"),
    "peftkit, closed form, precision: auto": peftkit("closed form", "auto"),
    "peftkit, trace, precision: auto": peftkit("trace", "auto"),
}
ALL = {**OWN, **THERE, **HERE, **VARIANTS}

# What each counts, as its source has it. "4-bit" is told of A and B, "adapters" of A to C, "full" of D,
# "recomputing" of cells with checkpointing, "kept" of those without.
COUNTS: dict[str, dict[str, str]] = {
    "peftkit": {
        "logits": "never held whole: TRL's fused head works in tiles, and one tile is counted",
        "4-bit": "the linear layers; embeddings and head stay in bf16",
        "adapters": "weights, both states, and gradients once they are there, in fp32",
        "full": "weights, gradients, both states and the step's roots in the type the plan holds weights in",
        "recomputing": "one input per layer, and one layer's tensors",
        "kept": "the tensors that the real code saves",
        "beside tensors": "the allocator's reserve (closed form: 4 %, trace: replayed), a 520 MiB context",
    },
    "fitcheck-llm": {
        "logits": "whole, in fp32, 4 times over for a 4-bit base and 3.5 times otherwise",
        "4-bit": "the linear layers; embeddings, head and norms in fp32",
        "adapters": "weights, gradients and both states in fp32",
        "full": "weights and gradients in bf16, both states, an fp32 master copy; no step temporaries",
        "recomputing": "one input per layer (fp32 for a 4-bit base), and the larger of logits and one layer",
        "kept": "12 hidden, 3 query, 1 key/value and 3 MLP widths for each layer, and the logits",
        "beside tensors": "500 MiB and 5 % of weights and activations; only a T4 has fitted values",
    },
    "canifinetune": {
        "logits": "whole: 14 bytes per token and vocabulary entry (bf16, and three copies in fp32)",
        "4-bit": "the linear layers and two unpacked MLP matrices; embeddings, head and norms in fp32",
        "adapters": "weights and gradients in fp32, states with a third copy for the step",
        "full": "weights, gradients, both states and one copy for the step in bf16; no master copy",
        "recomputing": "two hidden widths per layer, one layer's tensors (MLP in fp32 for 4-bit), the logits",
        "kept": "9 hidden and 4.5 MLP widths for each layer, and the logits",
        "beside tensors": "8 % of the GPU for context and allocator and 5 % for safety, whatever the run",
    },
    "ftuneai": {
        "logits": "not counted: the vocabulary is not used",
        "4-bit": "all parameters, embeddings and head too, and 2 %",
        "adapters": "weights and gradients in bf16, both states in fp32",
        "full": "weights and gradients in bf16, both states in fp32; no step temporaries",
        "recomputing": "4 hidden widths per layer, halved for flash attention, doubled for QLoRA; no MLP",
        "kept": "10 hidden widths per layer, halved for flash attention; no MLP",
        "beside tensors": "20 % of the sum",
    },
    "ml-memguard": {
        "logits": "not counted: there is no input for the vocabulary",
        "4-bit": "all parameters, embeddings and head too, and half a bit each for scales",
        "adapters": "every target as hidden by hidden, in bf16, with gradients and three copies as states",
        "full": "weights twice, gradients, and three copies as states, all in bf16",
        "recomputing": "5 layers of 32 (the square root), each with 9 hidden widths and one MLP width",
        "kept": "9 hidden widths and one MLP width for each layer",
        "beside tensors": "25 % of the sum and 400 MiB; a key/value cache is counted among the tensors",
    },
    "accelerate estimate-memory": {
        "logits": "not counted: no batch, length or activation goes in",
        "full": "the largest, not the sum, of weights, gradients, states and step: twice the fp32 size. "
        "The model is built without its head",
    },
    "deepspeed zero2": {
        "logits": "not counted: model states only",
        "full": "20 bytes per parameter: bf16 weights and gradients; fp32 gradients, master copy and states",
    },
    "deepspeed zero3": {
        "logits": "not counted: model states only",
        "full": "18 bytes per parameter as shards of one GPU, and the largest layer gathered",
    },
}


def differences(cell: Cell) -> dict[str, dict[str, str]]:
    """What each side counts in a cell, by subject and estimator."""
    subjects = ["logits", "full" if cell.is_full else "adapters", "beside tensors"]
    subjects += ["4-bit"] * cell.is_qlora + ["recomputing" if cell.checkpointing else "kept"]
    told = {s: {name: texts[s] for name, texts in COUNTS.items() if s in texts} for s in subjects}
    if not cell.is_full:
        for texts in told.values():
            for name in HERE:
                texts.pop(name, None)
    return told


def child(name: str, cell: Cell, folder: Path, packages: Path) -> Found:
    """One estimate in a process of its own, without a network, with empty caches."""
    apart = name.split(",", maxsplit=1)[0] in THERE
    python = folder / "venv" / "bin" / "python" if apart else Path(sys.executable)
    command = [str(python), "-P", __file__, "--estimate", name, "--cell", cell.name]
    command += ["--packages", str(packages)] if name.startswith("deepspeed") else []
    kept = {k: v for k, v in os.environ.items() if k == "PATH" or k.startswith(("LANG", "LC_"))}
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "PEFTKIT_CACHE", "HF_HOME"), str(folder / "home"))
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**kept, **places, **quiet}, timeout=300
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return {"none": f"It failed: {last[:160]}"}
    told: Found = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def install(folder: Path) -> tuple[Path, list[str]]:
    """A virtual environment with the others in it: (its packages, what was installed)."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-qq", *PINS], check=True)
    done = subprocess.run([*pip, "install", "-qq", "--no-deps", *NO_DEPS], check=False)
    if done.returncode != 0:
        print("DeepSpeed could not be installed: it is left out")
    listed = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True)
    return next((folder / "venv" / "lib").glob("python*/site-packages")), listed.stdout.split()


def shown(told: Found) -> str:
    if "none" in told:
        return "-"
    return f"{told['tensors_gib']:.2f} / {told['total_gib']:.2f}"


def held_in(estimates: Mapping[str, Mapping[str, Found]]) -> list[str]:
    """In which type peftkit's plan holds what it trains in D."""
    notes = []
    for name in ("peftkit, closed form", "peftkit, closed form, precision: auto"):
        told = estimates[name]["D"]
        text = f"{name}, D: weights in {told.get('weights')}, autocast {told.get('autocast')}"
        notes.append(text)
    return notes


def compare() -> None:
    from common import write_result

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "home").mkdir()
        packages, installed = install(folder)
        estimates: dict[str, dict[str, Found]] = {}
        for estimator in ALL:
            cells = CELLS[-1:] if estimator in VARIANTS else CELLS
            estimates[estimator] = {cell.name: child(estimator, cell, folder, packages) for cell in cells}
    heads = [f"{c.name} {c.method} x{c.batch}" for c in CELLS]
    print(f"{'GiB, tensors / total':<42}" + "".join(f"{head:>18}" for head in heads))
    for estimator, by_cell in estimates.items():
        row = [shown(by_cell.get(cell.name, {"none": ""})) for cell in CELLS]
        print(f"{estimator:<42}" + "".join(f"{text:>18}" for text in row))
    notes = held_in(estimates)
    print("\n".join(notes))
    result = {
        "what": "predictions, none measured; GiB; tensors: without allocator, context and safety",
        "model": {"id": MODEL, "parameters": PARAMETERS, "max_length": LENGTH, "rank": RANK, **CONFIG},
        "cells": {c.name: {**asdict(c), "differences": differences(c)} for c in CELLS},
        "estimates": {name: told for name, told in estimates.items() if name not in VARIANTS},
        "variants": {name: told for name, told in estimates.items() if name in VARIANTS},
        "notes": notes,
        "installed": installed,
    }
    write_result("estimators", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", choices=list(ALL), help="one estimate, as JSON (used by the script)")
    parser.add_argument("--cell", choices=[c.name for c in CELLS], default="A")
    parser.add_argument("--packages", help="a folder with packages, searched last")
    arguments = parser.parse_args()
    if arguments.estimate is None:
        compare()
        return
    if arguments.packages:
        sys.path.append(arguments.packages)
    cell = next(c for c in CELLS if c.name == arguments.cell)
    print("\n" + json.dumps(ALL[arguments.estimate](cell)))


if __name__ == "__main__":
    main()
