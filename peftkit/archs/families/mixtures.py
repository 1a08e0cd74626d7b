"""Decoders with mixtures of experts, whose experts are 3-D parameters since transformers 5."""

from __future__ import annotations

from peftkit.archs.families.pieces import LM, PRE_NORMS, QK_NORM, attention, decoder, experts, gated_ffn, rms
from peftkit.archs.family import BlockPart, Family, Linear, Weight
from peftkit.archs.sizes import Sizes

_ROUTED_EXPERTS_NOTE = (
    "routed experts are 3-D parameters: LoRA reaches them by name (targets: [experts]), other methods do not"
)


def _router(name: str, num: str, extra: str = "") -> Weight:
    return Weight(name, f"{num}*hidden{extra}", "router")


def qwen3_moe_kinds(sizes: Sizes) -> list[frozenset[str]]:
    """Return Qwen3-MoE's layer kinds: each `decoder_sparse_step`-th is a mixture, unless listed as dense."""
    step, dense_layers = sizes["decoder_sparse_step"], sizes.key("mlp_only_layers") or ()
    return [
        frozenset({"moe" if i not in dense_layers and sizes["num_experts"] > 0 and (i + 1) % step == 0 else "dense"})
        for i in range(sizes["layers"])
    ]


def llama4_kinds(sizes: Sizes) -> list[frozenset[str]]:
    """Return Llama 4's layer kinds: every `interleave_moe_layer_step`-th layer is a mixture."""
    step = sizes["interleave_moe_layer_step"]
    moe_layers = sizes.key("moe_layers") or range(step - 1, sizes["layers"], step)
    return [frozenset({"moe" if i in moe_layers else "dense"}) for i in range(sizes["layers"])]


def deepseek_kinds(sizes: Sizes) -> list[frozenset[str]]:
    """Return the parts of each layer, first to last: the first ones are dense."""
    num_dense = sizes["first_k_dense_replace"]
    query = "q low rank" if sizes.key("q_lora_rank") else "q direct"
    return [frozenset({query, "dense" if i < num_dense else "moe"}) for i in range(sizes["layers"])]


_Q_HEAD = "(qk_nope_head_dim+qk_rope_head_dim)"
_LATENT = (
    BlockPart(
        (
            Linear("self_attn.q_a_proj", "q_a", "hidden", "q_lora_rank", "attention_bias"),
            Linear("self_attn.q_b_proj", "q", "q_lora_rank", f"heads*{_Q_HEAD}"),
        ),
        (rms("self_attn.q_a_layernorm", "q_lora_rank"),),
        kind="q low rank",
    ),
    BlockPart((Linear("self_attn.q_proj", "q", "hidden", f"heads*{_Q_HEAD}"),), kind="q direct"),
    BlockPart(
        (
            Linear("self_attn.kv_a_proj_with_mqa", "kv_a", "hidden", "kv_lora_rank+qk_rope_head_dim", "attention_bias"),
            Linear("self_attn.kv_b_proj", "kv_b", "kv_lora_rank", "heads*(qk_nope_head_dim+v_head_dim)"),
            Linear("self_attn.o_proj", "o", "heads*v_head_dim", "hidden", "attention_bias"),
        ),
        (rms("self_attn.kv_a_layernorm", "kv_lora_rank"),),
        cache="kv_lora_rank+qk_rope_head_dim",  # kept as latents
    ),
)


def _deepseek_family(name: str, model_type: str, **defaults: object) -> Family:
    return decoder(
        name,
        (model_type,),
        *_LATENT,
        gated_ffn(kind="dense", by_parameter=True),
        experts("mlp.experts", "n_routed_experts", "moe_intermediate_size", kind="moe"),
        BlockPart(weights=(_router("mlp.gate", "n_routed_experts"),), kind="moe"),
        gated_ffn("mlp.shared_experts", ffn="moe_intermediate_size*n_shared_experts", kind="moe", by_parameter=True),
        PRE_NORMS,
        heads=LM,
        kinds=deepseek_kinds,
        defaults=defaults,
        sizes={"head_dim": _Q_HEAD, "kv": "heads*head_dim", "kv_heads": "heads"},
        refuses={
            "prefix": "its cache holds latents, and PEFT prepends keys and values",
            "oft": "its cache makes empty inputs, which PEFT's OFT cannot reshape",
        },
        mind=(_ROUTED_EXPERTS_NOTE,),
    )


FAMILIES: tuple[Family, ...] = (
    decoder(
        "Mixtral",
        ("mixtral",),
        attention(),
        experts("mlp.experts", "num_local_experts", "ffn"),
        BlockPart(weights=(_router("mlp.gate", "num_local_experts"),)),
        PRE_NORMS,
        window=0,
        mind=(_ROUTED_EXPERTS_NOTE,),
    ),
    decoder(
        "Qwen3-MoE",
        ("qwen3_moe",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn(kind="dense", by_parameter=True),
        experts("mlp.experts", "num_experts", "moe_intermediate_size", kind="moe"),
        BlockPart(weights=(_router("mlp.gate", "num_experts"),), kind="moe"),
        PRE_NORMS,
        QK_NORM,
        kinds=qwen3_moe_kinds,
        sizes={"num_experts": ("num_local_experts", "num_experts")},
        defaults={"decoder_sparse_step": 1, "num_experts": 128},
        mind=(_ROUTED_EXPERTS_NOTE,),
    ),
    _deepseek_family("DeepSeek-V2", "deepseek_v2", first_k_dense_replace=0),
    _deepseek_family("DeepSeek-V3", "deepseek_v3", first_k_dense_replace=3),
    decoder(
        "GPT-OSS",
        ("gpt_oss",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        BlockPart(
            (
                Linear("mlp.experts.gate_up_proj", "experts_gate_up", "hidden", "2*ffn", num="num_local_experts"),
                Linear("mlp.experts.down_proj", "experts_down", "ffn", "hidden", num="num_local_experts"),
            ),
            (
                Weight("self_attn.sinks", "heads", "sinks"),
                Weight("mlp.experts.biases", "num_local_experts*(2*ffn+hidden)", "expert biases"),
                _router("mlp.router", "num_local_experts", "+num_local_experts"),
            ),
        ),
        PRE_NORMS,
        fused_attention=False,
        defaults={"attention_bias": True, "head_dim": 64},
        window=2,
        packs=False,
        mind=(_ROUTED_EXPERTS_NOTE, "packed documents see each other in this family"),
    ),
    decoder(
        "Llama 4 (text)",
        ("llama4_text",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        gated_ffn("feed_forward", ffn="intermediate_size_mlp", kind="dense"),
        experts("feed_forward.experts", "num_local_experts", "ffn", kind="moe"),
        gated_ffn("feed_forward.shared_expert", kind="moe"),
        BlockPart(weights=(_router("feed_forward.router", "num_local_experts"),), kind="moe"),
        PRE_NORMS,
        heads=LM,
        kinds=llama4_kinds,
        defaults={"interleave_moe_layer_step": 1},
        mind=(_ROUTED_EXPERTS_NOTE,),
    ),
)
