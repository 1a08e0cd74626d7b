"""One epoch of LoRA over the same rows: padded at random, padded by length, packed.

    python benchmarks/packing.py

A Llama of some 8 million parameters with random weights reads 240 rows of 20 to 200 tokens, 8 examples to a
step, through the real trainer. The three ways take turns; the first turn warms up and counts nothing. Packed
rows have 512 tokens, and less padding is paid for by attention between documents that a mask then hides.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore")

from common import median, write_result  # noqa: E402
from memory import tokenizer  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, set_seed  # noqa: E402

from peftkit.archs import shape_from_config  # noqa: E402
from peftkit.data.tokens.lengths import count_lengths  # noqa: E402
from peftkit.data.tokens.mask import Tokenized  # noqa: E402
from peftkit.data.tokens.pack import pack_rows, packing_efficiency  # noqa: E402
from peftkit.model.adapter import attach as adapter  # noqa: E402
from peftkit.model.hardware import detect_device_without_torch  # noqa: E402
from peftkit.plan import DataFacts, Facts, ModelFacts, Plan, make_plan  # noqa: E402
from peftkit.plan.packing import GROUPED, SHUFFLED, padding_share  # noqa: E402
from peftkit.recipe import load  # noqa: E402
from peftkit.train.batches import build_train_dataset  # noqa: E402
from peftkit.train.trainer import build_trainer  # noqa: E402

NUM, SHORTEST, LONGEST, ROOM, VOCAB = 240, 20, 200, 512, 2000
STEP, MICRO, REPETITIONS = 8, 8, 5
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": ROOM,
}
WAYS: dict[str, dict[str, Any]] = {
    "at random": {"packing": False, "micro_batch": MICRO},
    "by length": {"packing": False, "micro_batch": MICRO},
    "packed": {"packing": True, "micro_batch": "auto"},
}


def rows() -> list[Tokenized]:
    draw = Random(0)
    found = []
    for number in range(NUM):
        ids = [draw.randrange(4, VOCAB) for _ in range(draw.randint(SHORTEST, LONGEST))]
        found.append(Tokenized(ids, list(ids), str(number)))
    return found


def plan_of(way: str, found: list[Tokenized], config: dict[str, Any]) -> Plan:
    """The plan that a recipe gives; at random is the plan by length with another order."""
    train = {"max_length": ROOM, "batch_size": STEP, "epochs": 1, "gradient_checkpointing": False} | WAYS[way]
    recipe = load({"base": "o/m", "method": {"name": "lora", "rank": 8}, "data": {"train": "x.jsonl"}, "train": train})
    shape = shape_from_config(config)
    assert shape is not None
    data = DataFacts(len(found), 0, "chat", lengths=count_lengths(found, "causal-lm", ROOM))
    plan = make_plan(recipe, Facts(detect_device_without_torch(), ModelFacts("o/m", "folder", shape), data))
    expected = {"at random": GROUPED, "by length": GROUPED, "packed": SHUFFLED}[way]
    assert plan.train.sampling == expected
    if way == "at random":
        return replace(plan, train=replace(plan.train, sampling=SHUFFLED))
    return plan


def epoch(plan: Plan, found: list[Tokenized], config: LlamaConfig) -> float:
    """Seconds of one epoch, without building the model."""
    set_seed(0)
    model = adapter.attach_adapter(LlamaForCausalLM(config), plan, tokenizer())
    drawn = build_train_dataset(plan, found, 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            model, plan, tokenizer(), train=drawn, output_dir=Path(folder), callbacks=[], optimizer=None
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


def main() -> None:
    logging.disable(logging.WARNING)
    config = LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    found = rows()
    lengths = [len(row.input_ids) for row in found]
    plans = {way: plan_of(way, found, config.to_dict()) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repetition in range(REPETITIONS + 1):
        for way, plan in plans.items():
            took = epoch(plan, found, config)
            print(f"{repetition} {way:10s} {took:6.2f} s", flush=True)
            if repetition:
                seconds[way].append(took)
    packs, told = pack_rows(lengths, ROOM), count_lengths(found, "causal-lm")
    assert told is not None
    share = {
        one: padding_share(told, ROOM, micro=MICRO, step=STEP, sampling=name)
        for one, name in (("at random", SHUFFLED), ("by length", GROUPED))
    }
    share["packed"] = 1 - packing_efficiency(lengths, packs, ROOM)
    middle = {way: median(values) for way, values in seconds.items()}
    result = {
        "num_rows": NUM,
        "num_tokens": sum(lengths),
        "num_packs": len(packs),
        "packs_per_step": plans["packed"].train.batch_size,
        "padding_percent": {way: round(100 * value, 1) for way, value in share.items()},
        "median_seconds": {way: round(value, 2) for way, value in middle.items()},
        "tokens_per_second": {way: round(sum(lengths) / value) for way, value in middle.items()},
        "against_at_random": {way: round(middle["at random"] / value, 2) for way, value in middle.items()},
        "seconds": {way: [round(one, 3) for one in values] for way, values in seconds.items()},
    }
    print(json.dumps({name: value for name, value in result.items() if name != "seconds"}, indent=2))
    write_result("packing", result)


if __name__ == "__main__":
    main()
