"""Hybrids of state layers with attention."""

from __future__ import annotations

from peftkit.archs.families.mixers import IN_ONLY, KERNELS, LEAKS, dt_rank, mamba, mamba2
from peftkit.archs.families.pieces import (
    LM,
    MIXED_CACHE,
    PRE_NORMS,
    attention,
    decoder,
    experts,
    gated,
    norms,
    rms,
)
from peftkit.archs.family import SHARED, Family, Linear, Part, Weight
from peftkit.archs.sizes import Sizes

_MIXED = {"prefix": MIXED_CACHE}
_DEFAULTS: dict[str, object] = {
    "mamba_expand": 2,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
}
_HYBRID_SIZES = {
    "inner": "ssm_heads*ssm_head_dim",
    "state": "mamba_d_state",
    "groups": "mamba_n_groups",
    "kernel": "mamba_d_conv",
    "ssm_heads": "mamba_n_heads",
    "ssm_head_dim": "mamba_d_head",
}


_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_NEWER_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}


def _bamba(sizes: Sizes) -> list[frozenset[str]]:
    attends = sizes.key("attn_layer_indices") or ()
    return [frozenset({"attention" if i in attends else "mamba"}) for i in range(sizes["layers"])]


def _jamba(sizes: Sizes) -> list[frozenset[str]]:
    def kinds(i: int) -> frozenset[str]:
        attends = i % sizes["attn_layer_period"] == sizes["attn_layer_offset"]
        mixes = i % sizes["expert_layer_period"] == sizes["expert_layer_offset"] and sizes["num_experts"] > 1
        return frozenset({"attention" if attends else "mamba", "moe" if mixes else "dense"})

    return [kinds(i) for i in range(sizes["layers"])]


def _zamba2(sizes: Sizes) -> list[frozenset[str]]:
    """Plain state layers, and hybrid ones; the first hybrids hold the weights that the later ones share."""
    found: list[frozenset[str]] = []
    num_shared, adapts_attention = sizes["num_mem_blocks"], sizes.flag("use_shared_attention_adapter")
    for kind in sizes.names("layers_block_type"):
        if kind != "hybrid":
            found.append(frozenset({_NEWER_NAMES.get(kind, kind)}))
            continue
        seen = sum("hybrid" in kinds for kinds in found)
        new = {"shared"} if seen < num_shared else set()
        if seen == 0:
            new |= {"adapters", "attention adapters"} if adapts_attention else {"adapters"}
        found.append(frozenset({"hybrid", *new}))
    return found


def _nemotron(sizes: Sizes) -> list[frozenset[str]]:
    """Each layer is one mixer; hub files write the pattern as a string."""
    pattern = sizes.key("hybrid_override_pattern")
    if pattern:
        kinds = [_PATTERN.get(letter, letter) for letter in str(pattern)]
    else:
        kinds = sizes.names("layers_block_type")
    return [frozenset({_NEWER_NAMES.get(kind, str(kind))}) for kind in kinds]


def _qwen3_next(sizes: Sizes) -> list[frozenset[str]]:
    every, listed = sizes["full_attention_interval"], sizes.names("layer_types")
    types = listed or [
        "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(sizes["layers"])
    ]
    dense, step = sizes.key("mlp_only_layers") or (), sizes["decoder_sparse_step"]
    return [
        frozenset({kind, "moe" if i not in dense and (i + 1) % step == 0 else "dense"})
        for i, kind in enumerate(types)
    ]


FAMILIES: tuple[Family, ...] = (
    decoder(
        "Jamba",
        ("jamba",),
        attention(kind="attention"),
        mamba("mamba", kind="mamba", normed=True),
        gated("feed_forward", kind="dense"),
        experts("feed_forward.experts", "num_experts", "ffn", kind="moe"),
        Part(weights=(Weight("feed_forward.router", "num_experts*hidden", "router"),), kind="moe"),
        norms("input_layernorm", "pre_ff_layernorm"),
        outside=(rms("model.final_layernorm"),),
        sizes={
            "inner": "mamba_expand*hidden",
            "state": "mamba_d_state",
            "kernel": "mamba_d_conv",
            "dt_rank": dt_rank("mamba_dt_rank"),
        },
        defaults={
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 16,
            "mamba_expand": 2,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
        },
        kinds=_jamba,
        positions="none",
        refuses=_MIXED,
        packs=False,
        mind=(LEAKS, IN_ONLY),
        kernels=KERNELS,
    ),
    decoder(
        "Bamba",
        ("bamba",),
        attention(kind="attention"),
        mamba2("mamba", kind="mamba"),
        gated("feed_forward"),
        norms("input_layernorm", "pre_ff_layernorm"),
        heads=LM,
        outside=(rms("model.final_layernorm"),),
        sizes=_HYBRID_SIZES,
        defaults={**_DEFAULTS, "mamba_d_head": 64},
        kinds=_bamba,
        refuses=_MIXED,
        packs=False,
        cached_prompts=False,
        mind=(LEAKS, IN_ONLY),
        kernels=KERNELS,
    ),
    decoder(
        "Falcon-H1",
        ("falcon_h1",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        mamba2("mamba", norm=False),
        gated("feed_forward", bias="mlp_bias"),
        norms("input_layernorm", "pre_ff_layernorm"),
        Part(weights=(Weight("mamba.norm", "inner", "gated norms"),), kind="normed"),
        heads=LM,
        outside=(rms("model.final_layernorm"),),
        sizes={**_HYBRID_SIZES, "inner": ("mamba_d_ssm", "mamba_expand*hidden")},
        defaults={**_DEFAULTS, "mamba_d_head": 8},
        kinds=lambda sizes: [frozenset({"normed"} if sizes.flag("mamba_rms_norm") else ())] * sizes["layers"],
        refuses=_MIXED,
        packs=False,
        mind=(LEAKS, IN_ONLY),
        kernels=KERNELS,
    ),
    decoder(
        "Zamba2",
        ("zamba2",),
        mamba2("mamba", kind="mamba"),
        norms("input_layernorm", kind="mamba"),
        mamba2("mamba_decoder.mamba", kind="hybrid"),
        norms("mamba_decoder.input_layernorm", kind="hybrid"),
        Part((Linear("linear", "mix", "hidden", "hidden"),), kind="hybrid", cache="2*kv"),
        Part(
            (
                Linear("shared_transformer.self_attn.q_proj", "q", "2*hidden", "q", blocked=SHARED),
                Linear("shared_transformer.self_attn.k_proj", "k", "2*hidden", "kv", blocked=SHARED),
                Linear("shared_transformer.self_attn.v_proj", "v", "2*hidden", "kv", blocked=SHARED),
                Linear("shared_transformer.self_attn.o_proj", "o", "q", "hidden", blocked=SHARED),
                Linear(
                    "shared_transformer.feed_forward.gate_up_proj",
                    "gate_up",
                    "hidden",
                    "2*ffn",
                    blocked=SHARED,
                ),
                Linear("shared_transformer.feed_forward.down_proj", "down", "ffn", "hidden", blocked=SHARED),
            ),
            (
                rms("shared_transformer.input_layernorm", "2*hidden"),
                rms("shared_transformer.pre_ff_layernorm"),
            ),
            kind="shared",
        ),
        Part(
            weights=(
                Weight(
                    "shared_transformer.feed_forward.gate_up_proj_adapter_list",
                    "num_hybrid*adapter_rank*(hidden+2*ffn)",
                    "shared adapters",
                ),
            ),
            kind="adapters",
        ),
        Part(
            weights=(
                Weight(
                    "shared_transformer.self_attn.adapter_lists",
                    "num_hybrid*3*adapter_rank*4*hidden",
                    "shared adapters",
                ),
            ),
            kind="attention adapters",
        ),
        outside=(rms("model.final_layernorm"),),
        tied_by_default=True,
        sizes={
            "inner": "mamba_expand*hidden",
            "state": "mamba_d_state",
            "groups": "mamba_ngroups",
            "kernel": "mamba_d_conv",
            "ssm_heads": "n_mamba_heads",
            "head_dim": ("attention_head_dim", "2*hidden//heads"),
            "num_hybrid": lambda sizes: sizes.names("layers_block_type").count("hybrid"),
        },
        defaults={
            "mamba_expand": 2,
            "mamba_d_state": 64,
            "mamba_ngroups": 1,
            "mamba_d_conv": 4,
            "n_mamba_heads": 8,
            "num_mem_blocks": 1,
            "adapter_rank": 128,
        },
        kinds=_zamba2,
        positions=lambda sizes: "rope" if sizes.flag("use_mem_rope") else "none",
        refuses={**_MIXED, "ln": f"its attention blocks share their norms: {SHARED}"},
        packs=False,
        mind=(LEAKS, IN_ONLY, f"its attention blocks are shared: {SHARED}"),
        kernels=KERNELS,
    ),
    decoder(
        "Nemotron-H",
        ("nemotron_h",),
        norms("norm"),
        mamba2("mixer", kind="mamba"),
        attention("mixer", kind="attention"),
        Part(
            (
                Linear("mixer.up_proj", "up", "hidden", "ffn"),
                Linear("mixer.down_proj", "down", "ffn", "hidden"),
            ),
            kind="mlp",
        ),
        experts("mixer.experts", "n_routed_experts", "moe_intermediate_size", kind="moe", fused=False),
        Part(
            (
                Linear("mixer.shared_experts.up_proj", "up", "hidden", "moe_shared_expert_intermediate_size"),
                Linear(
                    "mixer.shared_experts.down_proj", "down", "moe_shared_expert_intermediate_size", "hidden"
                ),
            ),
            (Weight("mixer.gate", "n_routed_experts*hidden", "router"),),
            kind="moe",
        ),
        heads=LM,
        outside=(rms("model.norm_f"),),
        embeddings="embeddings",
        sizes={
            "layers": lambda sizes: len(_nemotron(sizes)),
            "inner": "ssm_heads*ssm_head_dim",
            "state": "ssm_state_size",
            "groups": "n_groups",
            "kernel": "conv_kernel",
            "ssm_heads": "mamba_num_heads",
            "ssm_head_dim": "mamba_head_dim",
        },
        defaults={
            "head_dim": 128,
            "ssm_state_size": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "conv_kernel": 4,
        },
        kinds=_nemotron,
        positions="none",
        refuses=_MIXED,
        packs=False,
        activation=("mlp_hidden_act", "relu2"),
        mind=(LEAKS, IN_ONLY),
        kernels=KERNELS,
    ),
    decoder(
        "Qwen3-Next",
        ("qwen3_next",),
        Part(
            (
                Linear("self_attn.q_proj", "q", "hidden", "2*q", "attention_bias"),
                Linear("self_attn.k_proj", "k", "hidden", "kv", "attention_bias"),
                Linear("self_attn.v_proj", "v", "hidden", "kv", "attention_bias"),
                Linear("self_attn.o_proj", "o", "q", "hidden", "attention_bias"),
            ),
            (rms("self_attn.q_norm", "head_dim"), rms("self_attn.k_norm", "head_dim")),
            kind="full_attention",
            cache="2*kv",
        ),
        Part(
            (
                Linear("linear_attn.in_proj_qkvz", "ssm_in", "hidden", "2*linear_k+2*linear_v"),
                Linear("linear_attn.in_proj_ba", "ssm_ba", "hidden", "2*linear_num_value_heads"),
                Linear("linear_attn.out_proj", "ssm_out", "linear_v", "hidden"),
            ),
            (
                Weight("linear_attn.dt_bias", "linear_num_value_heads", "states"),
                Weight("linear_attn.A_log", "linear_num_value_heads", "states"),
                Weight("linear_attn.conv1d", "(2*linear_k+linear_v)*linear_conv_kernel_dim", "states"),
                rms("linear_attn.norm", "linear_value_head_dim"),
            ),
            kind="linear_attention",
            state="linear_k*linear_value_head_dim*linear_num_value_heads//linear_num_key_heads"
            "+(2*linear_k+linear_v)*linear_conv_kernel_dim",
        ),
        gated(kind="dense", by_parameter=True),
        experts("mlp.experts", "num_experts", "moe_intermediate_size", kind="moe"),
        gated("mlp.shared_expert", ffn="shared_expert_intermediate_size", kind="moe", by_parameter=True),
        Part(
            (Linear("mlp.shared_expert_gate", "router", "hidden", "1"),),
            (Weight("mlp.gate", "num_experts*hidden", "router"),),
            kind="moe",
        ),
        PRE_NORMS,
        sizes={
            "linear_k": "linear_num_key_heads*linear_key_head_dim",
            "linear_v": "linear_num_value_heads*linear_value_head_dim",
        },
        defaults={
            "full_attention_interval": 4,
            "decoder_sparse_step": 1,
            "linear_conv_kernel_dim": 4,
            "head_dim": 256,
        },
        kinds=_qwen3_next,
        refuses=_MIXED,
        packs=False,
        mind=(LEAKS,),
        kernels=("fla", "causal_conv1d"),
    ),
)
