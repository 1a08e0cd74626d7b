"""The table of families. Adding one is adding an entry."""

from __future__ import annotations

from peftkit.archs.family import Family, Linear

ROLES: dict[str, str] = {
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "o": "attention output projection",
    "qkv": "fused query, key and value projection",
    "gate": "gate of the feed-forward",
    "up": "up projection of the feed-forward",
    "gate_up": "fused gate and up projection",
    "down": "down projection of the feed-forward",
}
ATTENTION_ROLES = ("q", "k", "v", "o", "qkv")


def _attention(bias: bool | str = False, o_bias: bool | str = False) -> tuple[Linear, ...]:
    return (
        Linear("self_attn.q_proj", "q", "hidden", "q", bias),
        Linear("self_attn.k_proj", "k", "hidden", "kv", bias),
        Linear("self_attn.v_proj", "v", "hidden", "kv", bias),
        Linear("self_attn.o_proj", "o", "q", "hidden", o_bias),
    )


def _gated(bias: bool | str = False) -> tuple[Linear, ...]:
    return (
        Linear("mlp.gate_proj", "gate", "hidden", "ffn", bias),
        Linear("mlp.up_proj", "up", "hidden", "ffn", bias),
        Linear("mlp.down_proj", "down", "ffn", "hidden", bias),
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        "Llama",
        ("llama",),
        "model.layers.{i}",
        _attention("attention_bias", "attention_bias") + _gated("mlp_bias"),
    ),
    Family(
        "Mistral",
        ("mistral",),
        "model.layers.{i}",
        _attention() + _gated(),
    ),
    Family(
        "Qwen2",
        ("qwen2",),
        "model.layers.{i}",
        _attention(bias=True) + _gated(),
    ),
    Family(
        "Qwen3",
        ("qwen3",),
        "model.layers.{i}",
        _attention("attention_bias", "attention_bias") + _gated(),
        qk_norm=True,
    ),
    Family(
        "Gemma",
        ("gemma",),
        "model.layers.{i}",
        _attention() + _gated(),
        tied_by_default=True,
    ),
    Family(
        "Gemma 2",
        ("gemma2",),
        "model.layers.{i}",
        _attention() + _gated(),
        tied_by_default=True,
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    ),
    Family(
        "Gemma 3",
        ("gemma3_text",),
        "model.layers.{i}",
        _attention() + _gated(),
        tied_by_default=True,
        qk_norm=True,
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    ),
    Family(
        "Phi",
        ("phi",),
        "model.layers.{i}",
        (
            Linear("self_attn.q_proj", "q", "hidden", "q", True),
            Linear("self_attn.k_proj", "k", "hidden", "kv", True),
            Linear("self_attn.v_proj", "v", "hidden", "kv", True),
            Linear("self_attn.dense", "o", "q", "hidden", True),
            Linear("mlp.fc1", "up", "hidden", "ffn", True),
            Linear("mlp.fc2", "down", "ffn", "hidden", True),
        ),
        ia3_targets=("k_proj", "v_proj", "fc2"),
        ia3_feedforward=("fc2",),
        norms=("input_layernorm",),
        final_norm="final_layernorm",
        norm_bias=True,
        head_bias=True,
    ),
    Family(
        "Phi-3",
        ("phi3",),
        "model.layers.{i}",
        (
            Linear("self_attn.qkv_proj", "qkv", "hidden", "q+kv+kv"),
            Linear("self_attn.o_proj", "o", "q", "hidden"),
            Linear("mlp.gate_up_proj", "gate_up", "hidden", "ffn+ffn"),
            Linear("mlp.down_proj", "down", "ffn", "hidden"),
        ),
        ia3_targets=("qkv_proj", "down_proj"),
        ia3_feedforward=("down_proj",),
    ),
    Family(
        "GPT-2",
        ("gpt2",),
        "transformer.h.{i}",
        (
            Linear("attn.c_attn", "qkv", "hidden", "q+kv+kv", True),
            Linear("attn.c_proj", "o", "q", "hidden", True),
            Linear("mlp.c_fc", "up", "hidden", "ffn", True),
            Linear("mlp.c_proj", "down", "ffn", "hidden", True),
        ),
        ia3_targets=("c_attn", "mlp.c_proj"),
        ia3_feedforward=("mlp.c_proj",),
        embeddings="wte",
        norms=("ln_1", "ln_2"),
        final_norm="ln_f",
        norm_bias=True,
        learned_positions=True,
        tied_by_default=True,
        config_keys={
            "num_layers": "n_layer",
            "hidden": "n_embd",
            "heads": "n_head",
            "kv_heads": "n_head",
            "ffn": "n_inner",
            "positions": "n_positions",
        },
    ),
    Family(
        "GPT-NeoX",
        ("gpt_neox",),
        "gpt_neox.layers.{i}",
        (
            Linear("attention.query_key_value", "qkv", "hidden", "q+kv+kv", "attention_bias"),
            Linear("attention.dense", "o", "q", "hidden", "attention_bias"),
            Linear("mlp.dense_h_to_4h", "up", "hidden", "ffn", True),
            Linear("mlp.dense_4h_to_h", "down", "ffn", "hidden", True),
        ),
        ia3_targets=("query_key_value", "dense_4h_to_h"),
        ia3_feedforward=("dense_4h_to_h",),
        embeddings="embed_in",
        final_norm="final_layer_norm",
        norm_bias=True,
        config_keys={"kv_heads": "num_attention_heads"},
    ),
)
