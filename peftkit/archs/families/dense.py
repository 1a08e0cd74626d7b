"""Decoders with attention and one feed-forward in every layer."""

from __future__ import annotations

from peftkit.archs.families.pieces import (
    GEMMA_NORMS,
    LM,
    PRE_NORMS,
    QK_NORM,
    attention,
    decoder,
    fused_qkv,
    gated_ffn,
    layer_norm,
    norms,
    rms,
    two_layer_ffn,
)
from peftkit.archs.family import BlockPart, Family, Linear, Weight
from peftkit.archs.sizes import Sizes

_PACKING_NOTE = "packed documents see each other in this family"
_BIASED_NORM = (layer_norm("model.norm"),)
_GATE_UP = BlockPart(
    (Linear("mlp.gate_up_proj", "gate_up", "hidden", "2*ffn"), Linear("mlp.down_proj", "down", "ffn", "hidden"))
)


def falcon_kv_heads(sizes: Sizes) -> int:
    """Return Falcon's key/value heads: grouped in the new architecture, else one head or all of them."""
    if sizes.flag("new_decoder_architecture"):
        return sizes["num_kv_heads"]
    return 1 if sizes.flag("multi_query") else sizes["heads"]


def falcon_kinds(sizes: Sizes) -> list[frozenset[str]]:
    """Return the kind of every Falcon block by its norms: one, two, or sequential."""
    if sizes.flag("new_decoder_architecture") and sizes.key("num_ln_in_parallel_attn") != 1:
        kind = "two norms"
    else:
        kind = "one norm" if sizes.flag("parallel_attn") else "sequential"
    return [frozenset({kind})] * sizes["layers"]


FAMILIES: tuple[Family, ...] = (
    decoder(
        "Llama",
        ("llama",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(bias="mlp_bias"),
        PRE_NORMS,
    ),
    decoder("Mistral", ("mistral",), attention(), gated_ffn(), PRE_NORMS, window=0),
    decoder("Qwen2", ("qwen2",), attention(bias=True), gated_ffn(), PRE_NORMS),
    decoder(
        "Qwen3",
        ("qwen3",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(),
        PRE_NORMS,
        QK_NORM,
        defaults={"head_dim": 128},
    ),
    decoder(
        "SmolLM3",
        ("smollm3",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(bias="mlp_bias"),
        PRE_NORMS,
        tied_by_default=True,
    ),
    decoder(
        "Granite",
        ("granite",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(bias="mlp_bias"),
        PRE_NORMS,
        heads=LM,
    ),
    decoder(
        "OLMo 2",
        ("olmo2",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(),
        norms("post_attention_layernorm", "post_feedforward_layernorm"),
        BlockPart(weights=(rms("self_attn.q_norm", "q"), rms("self_attn.k_norm", "kv"))),
        norm_place="post",
    ),
    decoder(
        "Cohere",
        ("cohere", "cohere2"),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(),
        norms("input_layernorm"),
        heads=LM,
        window=4,
        tied_by_default=True,
        norm="LayerNorm",
    ),
    decoder(
        "GLM",
        ("glm",),
        attention(bias="attention_bias"),
        _GATE_UP,
        PRE_NORMS,
        defaults={"attention_bias": True, "head_dim": 128},
    ),
    decoder(
        "GLM-4",
        ("glm4",),
        attention(bias="attention_bias"),
        _GATE_UP,
        PRE_NORMS,
        norms("post_self_attn_layernorm", "post_mlp_layernorm"),
        defaults={"attention_bias": True, "head_dim": 128},
        norm_place="pre and post",
    ),
    decoder(
        "StarCoder2",
        ("starcoder2",),
        attention(bias="use_bias", o_bias="use_bias"),
        two_layer_ffn("mlp", "c_fc", "c_proj", bias="use_bias"),
        norms("input_layernorm", "post_attention_layernorm", biased=True),
        outside=_BIASED_NORM,
        defaults={"use_bias": True},
        window=0,
        tied_by_default=True,
        norm="LayerNorm",
        activation=("hidden_act", "gelu_pytorch_tanh"),
    ),
    decoder(
        "Gemma",
        ("gemma",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(),
        PRE_NORMS,
        defaults={"head_dim": 256},
        tied_by_default=True,
        activation=("hidden_act", "gelu_pytorch_tanh"),
    ),
    decoder(
        "Gemma 2",
        ("gemma2",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(),
        GEMMA_NORMS,
        defaults={"head_dim": 256},
        window=2,
        fused_attention=False,
        tied_by_default=True,
        norm_place="pre and post",
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    ),
    decoder(
        "Gemma 3",
        ("gemma3_text",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(),
        GEMMA_NORMS,
        QK_NORM,
        defaults={"head_dim": 256},
        window=6,
        tied_by_default=True,
        norm_place="pre and post",
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    ),
    decoder(
        "Phi",
        ("phi",),
        attention(bias=True, o_bias=True, o="dense"),
        two_layer_ffn("mlp", "fc1", "fc2"),
        norms("input_layernorm", biased=True),
        outside=(layer_norm("model.final_layernorm"),),
        head_bias=True,
        norm="LayerNorm",
        activation=("hidden_act", "gelu_new"),
    ),
    decoder(
        "Phi-3",
        ("phi3",),
        BlockPart(
            (Linear("self_attn.qkv_proj", "qkv", "hidden", "q+2*kv"), Linear("self_attn.o_proj", "o", "q", "hidden")),
            cache="2*kv",
        ),
        _GATE_UP,
        PRE_NORMS,
        window=0,
    ),
    decoder(
        "GPT-2",
        ("gpt2",),
        fused_qkv("attn", "c_attn", "c_proj"),
        two_layer_ffn("mlp", "c_fc", "c_proj"),
        norms("ln_1", "ln_2", biased=True),
        block="transformer.h.{i}",
        outside=(Weight("transformer.wpe", "positions*hidden", "positions"), layer_norm("transformer.ln_f")),
        embeddings="wte",
        tied_by_default=True,
        sizes={
            "layers": "n_layer",
            "hidden": "n_embd",
            "heads": "n_head",
            "kv_heads": "n_head",
            "ffn": ("n_inner", "4*hidden"),
            "positions": "n_positions",
        },
        positions="learned",
        norm="LayerNorm",
        activation=("activation_function", "gelu_new"),
        refuses={"oft": "PEFT's OFT knows no Conv1D layers, which GPT-2 is made of"},
    ),
    decoder(
        "GPT-NeoX",
        ("gpt_neox",),
        BlockPart(
            (
                Linear("attention.query_key_value", "qkv", "hidden", "3*hidden", "attention_bias"),
                Linear("attention.dense", "o", "hidden", "hidden", "attention_bias"),
            ),
            cache="2*hidden",
        ),
        two_layer_ffn("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        norms("input_layernorm", "post_attention_layernorm", biased=True),
        block="gpt_neox.layers.{i}",
        outside=(layer_norm("gpt_neox.final_layer_norm"),),
        embeddings="embed_in",
        sizes={"kv_heads": "heads", "head_dim": "hidden//heads"},
        defaults={"attention_bias": True},
        norm="LayerNorm",
        activation=("hidden_act", "gelu"),
    ),
    decoder(
        "Falcon",
        ("falcon",),
        BlockPart(
            (
                Linear("self_attention.query_key_value", "qkv", "hidden", "q+2*kv", "bias"),
                Linear("self_attention.dense", "o", "q", "hidden", "bias"),
            ),
            cache="2*kv",
        ),
        two_layer_ffn("mlp", "dense_h_to_4h", "dense_4h_to_h", bias="bias"),
        BlockPart(weights=(layer_norm("input_layernorm"),), kind="one norm"),
        norms("input_layernorm", "post_attention_layernorm", biased=True, kind="sequential"),
        norms("ln_attn", "ln_mlp", biased=True, kind="two norms"),
        block="transformer.h.{i}",
        outside=(layer_norm("transformer.ln_f"),),
        embeddings="word_embeddings",
        tied_by_default=True,
        sizes={
            "kv_heads": falcon_kv_heads,
            "head_dim": "hidden//heads",
            "ffn": ("ffn_hidden_size", "4*hidden"),
            "positions": ("max_position_embeddings", "2048"),
        },
        defaults={"multi_query": True, "parallel_attn": True},
        kinds=falcon_kinds,
        positions=lambda sizes: "alibi" if sizes.flag("alibi") else "rope",
        norm="LayerNorm",
        activation=("activation", "gelu"),
        packs=False,
        mind=(_PACKING_NOTE, "its linear layers are a subclass that transformers would leave out of 4-bit: fixed here"),
    ),
    decoder(
        "BLOOM",
        ("bloom",),
        fused_qkv("self_attention", "query_key_value", "dense"),
        two_layer_ffn("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        norms("input_layernorm", "post_attention_layernorm", biased=True),
        block="transformer.h.{i}",
        outside=(layer_norm("transformer.word_embeddings_layernorm"), layer_norm("transformer.ln_f")),
        embeddings="word_embeddings",
        tied_by_default=True,
        sizes={
            "layers": ("n_layer", "num_hidden_layers"),
            "heads": ("n_head", "num_attention_heads"),
            "hidden": ("hidden_size", "n_embed"),
            "kv_heads": "heads",
            "ffn": "4*hidden",
            "positions": ("seq_length", "0"),
        },
        positions="alibi",
        fused_attention=False,
        norm="LayerNorm",
        activation=("hidden_act", "gelu"),
        packs=False,
        mind=(_PACKING_NOTE,),
    ),
    decoder(
        "MPT",
        ("mpt",),
        BlockPart(
            (Linear("attn.Wqkv", "qkv", "hidden", "3*hidden"), Linear("attn.out_proj", "o", "hidden", "hidden")),
            cache="2*hidden",
        ),
        two_layer_ffn("ffn", "up_proj", "down_proj", bias=False),
        norms("norm_1", "norm_2"),
        block="transformer.blocks.{i}",
        outside=(rms("transformer.norm_f"),),
        embeddings="wte",
        tied_by_default=True,
        sizes={
            "layers": "n_layers",
            "hidden": "d_model",
            "heads": "n_heads",
            "kv_heads": "heads",
            "ffn": "expansion_ratio*hidden",
            "positions": "max_seq_len",
        },
        defaults={"expansion_ratio": 4},
        positions="alibi",
        fused_attention=False,
        norm="LayerNorm",
        activation=("hidden_act", "gelu"),
        packs=False,
        mind=(_PACKING_NOTE,),
    ),
)
