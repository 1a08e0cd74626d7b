"""Training steps of recurrent families in plain torch against a transformer of about their size, in turn.

    python benchmarks/slow_paths.py

The fused kernels of these families need a GPU. Without them, and always on a CPU, transformers runs plain
torch: this measures what that costs. One step: a row of 128 tokens, forward and backward, with LoRA.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
from common import median, write_result
from transformers import AutoConfig, AutoModelForCausalLM

from peftkit.archs import shape_from_config
from peftkit.methods import METHODS
from peftkit.model.hardware import detect_device_without_torch
from peftkit.plan.method import default_selection

ROWS, TOKENS, STEPS, ROUNDS = 1, 128, 1, 3
_IDS = {"vocab_size": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZE = {**_IDS, "hidden_size": 512, "num_hidden_layers": 6}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1536}
_MAMBA2 = {"head_dim": 64, "state_size": 64, "chunk_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZE, **_HEADS},
    "mamba": {**_SIZE, "num_hidden_layers": 12},
    "mamba2": {**_SIZE, "num_hidden_layers": 12, "num_heads": 16, "n_groups": 1, **_MAMBA2},
    "rwkv": {**_SIZE, "attention_hidden_size": 512, "intermediate_size": 2048},
    "falcon_h1": {
        **_SIZE,
        **_HEADS,
        "mamba_d_ssm": 512,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_chunk_size": 64,
    },
}


def build(model_type: str) -> tuple[Any, Any]:
    """(model with LoRA at peftkit's defaults, its shape)."""
    import peft

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    shape = shape_from_config(config.to_dict())
    assert shape is not None
    options = METHODS["lora"].options(name="lora")
    spec = METHODS["lora"].peft(options, shape, default_selection(METHODS["lora"], shape))
    assert spec is not None
    base = AutoModelForCausalLM.from_config(config)
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **spec.arguments)), shape


def step_seconds(model: Any) -> float:
    """One forward and backward pass."""
    ids = torch.randint(3, _IDS["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.perf_counter() - started


def main() -> None:
    """Measure in turn and print the ratios."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    models = {name: build(name) for name in MODELS}
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    for model, _ in models.values():
        step_seconds(model.train())  # warms up
    for _ in range(ROUNDS):
        for name, (model, _) in models.items():
            seconds[name] += [step_seconds(model) for _ in range(STEPS)]
    medians = {name: median(values) for name, values in seconds.items()}
    rows = [
        {
            "name": name,
            "num_parameters": models[name][1].num_parameters,
            "step_seconds": round(medians[name], 4),
            "tokens_per_second": round(ROWS * TOKENS / medians[name], 1),
            "ratio": round(medians["llama"] / medians[name], 3),
        }
        for name in MODELS
    ]
    for row in rows:
        print(f"{row['name']:<10} {row['tokens_per_second']:>8,.0f} tokens/s  x{row['ratio']:.2f}")
    print(write_result("slow_paths", {"cpu": detect_device_without_torch().name, "tokens": TOKENS, "rows": rows}))


if __name__ == "__main__":
    main()
