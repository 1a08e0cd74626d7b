"""How far the closed form of kept activations is from the ledger, per dense family: fitted and written.

    python -m tests.conformance.activations

`peftkit.plan.activations` knows what autograd saves in the usual decoder. Where a family does otherwise
(a mask of its own, an activation written out, a copy more), the rest is linear in the layer's sizes. Here
each dense family is traced at several sizes and depths, the rest is fitted, and what is not nothing goes to
`peftkit/archs/data/activations.json`. A test proves the file against sizes that were not fitted.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.archs import family_of, shape_from_config
from peftkit.plan import DeviceFacts, Plan
from peftkit.plan.activations import FEATURES, activation_bytes, correction_key, group_layers, layer_features
from peftkit.plan.plan import Batch
from tests.rigs.plans import plan_for
from tests.rigs.tiny import TINY, tiny_config

CPU = DeviceFacts("cpu", "a CPU", 24 * 2**30, True, True)
TARGET = Path(__file__).parents[2] / "peftkit" / "archs" / "data" / "activations.json"
DENSE = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "cohere", "cohere2", "glm", "glm4",
    "starcoder2", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox",
    "falcon", "bloom", "mpt",
)  # fmt: skip
# (heads, key-value heads, head size, feed-forward, rows, tokens); the hidden size follows
SIZES = (
    (4, 2, 16, 96, 1, 48),
    (4, 2, 32, 160, 1, 32),
    (8, 2, 16, 224, 1, 40),
    (8, 4, 16, 64, 1, 64),
    (4, 4, 32, 288, 1, 24),
    (4, 1, 16, 416, 1, 56),
    (8, 2, 32, 352, 1, 16),
    (2, 1, 64, 192, 1, 72),
    (6, 3, 16, 128, 1, 36),
    (6, 2, 32, 256, 1, 20),
)
UNFITTED = ((4, 2, 64, 512, 2, 96), (8, 4, 32, 320, 1, 128))
VOCAB = 509  # like no other size: the ledger tells logits by it
PRECISIONS = ("fp32", "bf16", "autocast")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4, "targets": "all-linear"},
    "full": {"name": "full"},
}


def period(model_type: str) -> int:
    """Layers after which the kinds of layers repeat."""
    window = family_of(model_type).window  # type: ignore[union-attr]
    return window or 1


def config_of(model_type: str, size: tuple[int, ...], num_layers: int) -> dict[str, Any]:
    """A configuration of these sizes under the names that the family uses."""
    heads, kv, dim, ffn, _, tokens = size
    own = tiny_config(model_type).to_dict()
    hidden = heads * dim * (1 + (ffn // 32) % 2 if "head_dim" in own else 1)
    wanted = {
        "hidden_size": hidden, "n_embd": hidden, "d_model": hidden,
        "num_attention_heads": heads, "n_head": heads, "n_heads": heads,
        "num_key_value_heads": kv, "num_kv_heads": kv, "head_dim": dim,
        "intermediate_size": ffn, "n_inner": ffn, "ffn_hidden_size": ffn,
        "num_hidden_layers": num_layers, "n_layer": num_layers, "n_layers": num_layers,
        "sliding_window": 2 * tokens, "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512,
    }  # fmt: skip
    changes = {key: value for key, value in wanted.items() if key in own}
    changes.pop("layer_types", None)
    base = {key: value for key, value in TINY[model_type].items() if key not in changes}
    from transformers import AutoConfig

    made = AutoConfig.for_model(model_type, **{**base, **changes, "vocab_size": VOCAB})
    for name in list(made.to_dict()):
        if "dropout" in name or name.endswith("_pdrop"):
            made.update({name: 0.0})
    return {**json.loads(made.to_json_string()), "model_type": model_type}


def plan_at(config: dict[str, Any], method: str, precision: str, batch: Batch) -> Plan:
    train = {"max_length": 512, "micro_batch": batch.num_rows, "gradient_checkpointing": False}
    train["precision"] = "fp32" if precision == "fp32" else "bf16"
    plan = plan_for(config, METHODS[method], device=CPU, train=train)
    if precision != "autocast":
        return plan
    dtype = "float32" if method == "full" else "bfloat16"
    base = replace(plan.base, dtype=dtype)
    return replace(plan, base=base, train=replace(plan.train, autocast="bf16"))


def rest_of(model_type: str, size: tuple[int, ...], method: str, precision: str) -> tuple[list[float], float, Plan]:
    """([rest per token of one period of layers, rest of what is above them], all that is kept, plan)."""
    from peftkit.prepare.traced_memory import trace_plan

    rows, tokens = size[4], size[5]
    batch = Batch(rows, tokens, 0, rows * (tokens - 1), is_padded=False)
    rests, total = [], 0.0
    for depth in (period(model_type), 2 * period(model_type)):
        config = config_of(model_type, size, depth)
        plan = plan_at(config, method, precision, batch)
        shape = shape_from_config(config)
        assert shape is not None
        real = trace_plan(plan, config, batch).saved_activation_bytes
        said = activation_bytes(shape, plan, batch, corrections={})["activations"]
        total = total or real / (rows * tokens)
        rests.append((real - said) / (rows * tokens))
    layer = rests[1] - rests[0]
    return [layer, rests[0] - layer], total, plan


def cells() -> Iterator[tuple[str, str, str]]:
    for model_type in DENSE:
        for method in METHODS:
            for precision in PRECISIONS:
                yield model_type, method, precision


def sparse(rows: Any, target: Any, totals: Any) -> tuple[dict[str, float], float]:
    """({feature: bytes}, largest error as a share of what is kept) with as few features as 0.3 % allows."""
    import numpy as np

    def solve(columns: list[int]) -> tuple[Any, float]:
        if not columns:
            return np.zeros(0), float((np.abs(target) / totals).max())
        solved, *_ = np.linalg.lstsq(rows[:, columns], target, rcond=None)
        return solved, float((np.abs(rows[:, columns] @ solved - target) / totals).max())

    columns = list(range(len(FEATURES)))
    allowed = max(0.003, 1.5 * solve(columns)[1])
    while columns:
        tried = [(solve([c for c in columns if c != out])[1], out) for out in columns]
        error, out = min(tried)
        if error > allowed:
            break
        columns.remove(out)
    solved, error = solve(columns)
    return {FEATURES[c]: float(v) for c, v in zip(columns, solved, strict=True)}, error


def fit(model_type: str, method: str, precision: str) -> tuple[str, dict[str, dict[str, float]]]:
    """(mode, {"layer": ..., "above": ...}) of bytes per token by feature; empty where nothing is left."""
    import numpy as np

    rows, targets, totals = [], [], []
    plan = None
    for number, size in enumerate(SIZES):
        if number == 2 and all(abs(v) < 0.004 * t for r, t in zip(targets, totals, strict=True) for v in r):
            break  # the rules say it all
        rest, total, plan = rest_of(model_type, size, method, precision)
        totals.append(total)
        config = config_of(model_type, size, period(model_type))
        shape = shape_from_config(config)
        assert shape is not None
        batch = Batch(size[4], size[5], 0, size[4] * (size[5] - 1), is_padded=False)
        rows.append(layer_features(group_layers(shape)[0], shape, batch))
        targets.append(rest)
    assert plan is not None
    if len(rows) < len(SIZES):
        print(f"{model_type:12s} {method:5s} {precision:9s} as the rules say", flush=True)
        return correction_key(plan), {}
    found, left = {}, 0.0
    for name, column in (("layer", 0), ("above", 1)):
        per = period(model_type) if name == "layer" else 1
        target = np.array([rest[column] for rest in targets])
        coefficients, error = sparse(np.array(rows), target, np.array(totals))
        left = max(left, error)
        if coefficients:
            found[name] = {feature: round(value / per, 3) for feature, value in coefficients.items()}
    print(f"{model_type:12s} {method:5s} {precision:9s} off by {100 * left:5.2f} %: {found}", flush=True)
    return correction_key(plan), found


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    table: dict[str, dict[str, Any]] = {}
    for model_type, method, precision in cells():
        mode, found = fit(model_type, method, precision)
        table.setdefault(model_type, {})[mode] = found
    TARGET.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
