"""Building blocks shared by families: attention, feed-forwards, norms, heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.archs.family import BlockPart, Family, LayerKinds, Linear, Stack, Task, TaskHead, Weight

Bias = bool | str
LM: Mapping[Task, TaskHead] = {"causal-lm": TaskHead((), ())}
LM_AND_SCORE: Mapping[Task, TaskHead] = {
    **LM,
    "classification": TaskHead((Weight("score", "num_labels*hidden", "head"),), ("score",)),
}
NO_KEY_VALUES = "it has no attention, so there are no keys and values to prepend"
MIXED_CACHE = "PEFT builds a cache of attention layers only, which a model with state layers cannot read"
NEVER_CALLED = "its weight is read, the layer is never called: an adapter on it changes nothing"
FUSED_KERNEL = "the fused kernel reads its weight on a GPU and would bypass an adapter"


def rms(name: str, size: str = "hidden") -> Weight:
    """Build a norm with a weight only."""
    return Weight(name, size)


def layer_norm(name: str) -> Weight:
    """Build a norm with weight and bias."""
    return Weight(name, "2*hidden")


def attention(
    place: str = "self_attn", *, bias: Bias = False, o_bias: Bias = False, o: str = "o_proj", kind: str = ""
) -> BlockPart:
    """Build separate query, key, value and output projections; grouped if kv is narrower than q."""
    return BlockPart(
        (
            Linear(f"{place}.q_proj", "q", "hidden", "q", bias),
            Linear(f"{place}.k_proj", "k", "hidden", "kv", bias),
            Linear(f"{place}.v_proj", "v", "hidden", "kv", bias),
            Linear(f"{place}.{o}", "o", "q", "hidden", o_bias),
        ),
        kind=kind,
        cache="2*kv",
    )


def gated_ffn(
    place: str = "mlp", *, bias: Bias = False, ffn: str = "ffn", kind: str = "", by_parameter: bool = False
) -> BlockPart:
    """Build a gated feed-forward: down(act(gate(x)) * up(x))."""
    return BlockPart(
        (
            Linear(f"{place}.gate_proj", "gate", "hidden", ffn, bias, by_parameter=by_parameter),
            Linear(f"{place}.up_proj", "up", "hidden", ffn, bias, by_parameter=by_parameter),
            Linear(f"{place}.down_proj", "down", ffn, "hidden", bias, by_parameter=by_parameter),
        ),
        kind=kind,
    )


def two_layer_ffn(place: str, up: str, down: str, *, bias: Bias = True, ffn: str = "ffn") -> BlockPart:
    """Build a plain feed-forward: down(act(up(x)))."""
    dot = f"{place}." if place else ""
    return BlockPart(
        (Linear(f"{dot}{up}", "up", "hidden", ffn, bias), Linear(f"{dot}{down}", "down", ffn, "hidden", bias))
    )


def fused_qkv(place: str, qkv: str, o: str, *, bias: Bias = True, d_out: str = "q+2*kv") -> BlockPart:
    """Build attention with one projection for queries, keys and values."""
    return BlockPart(
        (Linear(f"{place}.{qkv}", "qkv", "hidden", d_out, bias), Linear(f"{place}.{o}", "o", "q", "hidden", bias)),
        cache="2*kv",
    )


def experts(place: str, num: str, ffn: str, *, kind: str = "", fused: bool = True, hidden: str = "hidden") -> BlockPart:
    """Build the routed experts of a mixture: one 3-D parameter per projection for all experts."""
    up = (
        Linear(f"{place}.gate_up_proj", "experts_gate_up", hidden, f"2*{ffn}", num=num)
        if fused
        else Linear(f"{place}.up_proj", "experts_up", hidden, ffn, num=num)
    )
    return BlockPart((up, Linear(f"{place}.down_proj", "experts_down", ffn, hidden, num=num)), kind=kind)


def norms(*names: str, biased: bool = False, kind: str = "") -> BlockPart:
    """Build norms of the hidden size."""
    make = layer_norm if biased else rms
    return BlockPart(weights=tuple(make(name) for name in names), kind=kind)


PRE_NORMS = norms("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
QK_NORM = BlockPart(weights=(rms("self_attn.q_norm", "head_dim"), rms("self_attn.k_norm", "head_dim")))


def decoder(
    name: str,
    model_types: tuple[str, ...],
    *parts: BlockPart,
    block: str = "model.layers.{i}",
    heads: Mapping[Task, TaskHead] = LM_AND_SCORE,
    outside: tuple[Weight, ...] = (Weight("model.norm", "hidden"),),
    kinds: LayerKinds | None = None,
    **fields: Any,
) -> Family:
    """Build a family that is one stack of blocks with a language-model head."""
    return Family(name, model_types, (Stack(block, parts, kinds=kinds),), heads, outside, **fields)
