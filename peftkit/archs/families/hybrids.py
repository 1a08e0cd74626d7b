"""Hybrids of state-space layers and attention."""

from __future__ import annotations

from peftkit.archs.families.mixers import IN_PROJ_NOTE, KERNELS, PACKING_NOTE, dt_rank, mamba, mamba2
from peftkit.archs.families.pieces import LM, MIXED_CACHE, PRE_NORMS, attention, decoder, experts, gated_ffn, norms, rms
from peftkit.archs.family import SHARED_WEIGHT, BlockPart, Family, Linear, Weight
from peftkit.archs.sizes import Sizes

_NO_PREFIX = {"prefix": MIXED_CACHE}
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


def bamba_kinds(sizes: Sizes) -> list[frozenset[str]]:
    """Return the parts of each layer, first to last."""
    attention_layers = sizes.key("attn_layer_indices") or ()
    return [frozenset({"attention" if i in attention_layers else "mamba"}) for i in range(sizes["layers"])]


def jamba_kinds(sizes: Sizes) -> list[frozenset[str]]:
    """Return the parts of each layer, first to last."""

    def kinds(i: int) -> frozenset[str]:
        is_attention = i % sizes["attn_layer_period"] == sizes["attn_layer_offset"]
        is_mixture = i % sizes["expert_layer_period"] == sizes["expert_layer_offset"] and sizes["num_experts"] > 1
        return frozenset({"attention" if is_attention else "mamba", "moe" if is_mixture else "dense"})

    return [kinds(i) for i in range(sizes["layers"])]


def zamba2_kinds(sizes: Sizes) -> list[frozenset[str]]:
    """Return Zamba2's layer kinds; its first hybrid layers hold the weights that later ones share."""
    layer_kinds: list[frozenset[str]] = []
    num_shared, adapts_attention = sizes["num_mem_blocks"], sizes.flag("use_shared_attention_adapter")
    for kind in sizes.names("layers_block_type"):
        if kind != "hybrid":
            layer_kinds.append(frozenset({_NEWER_NAMES.get(kind, kind)}))
            continue
        num_hybrids = sum("hybrid" in kinds for kinds in layer_kinds)
        extra_kinds = {"shared"} if num_hybrids < num_shared else set()
        if num_hybrids == 0:
            extra_kinds |= {"adapters", "attention adapters"} if adapts_attention else {"adapters"}
        layer_kinds.append(frozenset({"hybrid", *extra_kinds}))
    return layer_kinds


def nemotron_kinds(sizes: Sizes) -> list[frozenset[str]]:
    """Return Nemotron-H's layer kinds, one mixer each; hub files write the pattern as a string."""
    pattern = sizes.key("hybrid_override_pattern")
    kinds = [_PATTERN.get(letter, letter) for letter in str(pattern)] if pattern else sizes.names("layers_block_type")
    layers = [_NEWER_NAMES.get(kind, str(kind)) for kind in kinds]
    moe = {"moe", "latent moe"} if sizes.key("moe_latent_size") else {"moe"}
    return [frozenset(moe if kind == "moe" else {kind}) for kind in layers]


def qwen3_next_kinds(sizes: Sizes) -> list[frozenset[str]]:
    """Return the parts of each layer, first to last."""
    interval, listed_types = sizes["full_attention_interval"], sizes.names("layer_types")
    types = listed_types or [
        "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(sizes["layers"])
    ]
    dense, step = sizes.key("mlp_only_layers") or (), sizes["decoder_sparse_step"]
    return [
        frozenset({kind, "moe" if i not in dense and (i + 1) % step == 0 else "dense"}) for i, kind in enumerate(types)
    ]


FAMILIES: tuple[Family, ...] = (
    decoder(
        "Jamba",
        ("jamba",),
        attention(kind="attention"),
        mamba("mamba", kind="mamba", has_norms=True),
        gated_ffn("feed_forward", kind="dense"),
        experts("feed_forward.experts", "num_experts", "ffn", kind="moe"),
        BlockPart(weights=(Weight("feed_forward.router", "num_experts*hidden", "router"),), kind="moe"),
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
        kinds=jamba_kinds,
        positions="none",
        refuses=_NO_PREFIX,
        packs=False,
        mind=(PACKING_NOTE, IN_PROJ_NOTE),
        kernels=KERNELS,
    ),
    decoder(
        "Bamba",
        ("bamba",),
        attention(kind="attention"),
        mamba2("mamba", kind="mamba"),
        gated_ffn("feed_forward"),
        norms("input_layernorm", "pre_ff_layernorm"),
        heads=LM,
        outside=(rms("model.final_layernorm"),),
        sizes=_HYBRID_SIZES,
        defaults={**_DEFAULTS, "mamba_d_head": 64},
        kinds=bamba_kinds,
        refuses=_NO_PREFIX,
        packs=False,
        cached_prompts=False,
        mind=(PACKING_NOTE, IN_PROJ_NOTE),
        kernels=KERNELS,
    ),
    decoder(
        "Falcon-H1",
        ("falcon_h1",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        mamba2("mamba", norm=False),
        gated_ffn("feed_forward", bias="mlp_bias"),
        norms("input_layernorm", "pre_ff_layernorm"),
        BlockPart(weights=(Weight("mamba.norm", "inner", "gated norms"),), kind="normed"),
        heads=LM,
        outside=(rms("model.final_layernorm"),),
        sizes={**_HYBRID_SIZES, "inner": ("mamba_d_ssm", "mamba_expand*hidden")},
        defaults={**_DEFAULTS, "mamba_d_head": 8},
        kinds=lambda sizes: [frozenset({"normed"} if sizes.flag("mamba_rms_norm") else ())] * sizes["layers"],
        refuses=_NO_PREFIX,
        packs=False,
        mind=(PACKING_NOTE, IN_PROJ_NOTE),
        kernels=KERNELS,
    ),
    decoder(
        "Zamba2",
        ("zamba2",),
        mamba2("mamba", kind="mamba"),
        norms("input_layernorm", kind="mamba"),
        mamba2("mamba_decoder.mamba", kind="hybrid"),
        norms("mamba_decoder.input_layernorm", kind="hybrid"),
        BlockPart((Linear("linear", "mix", "hidden", "hidden"),), kind="hybrid", cache="2*kv"),
        BlockPart(
            (
                Linear("shared_transformer.self_attn.q_proj", "q", "2*hidden", "q", blocked_reason=SHARED_WEIGHT),
                Linear("shared_transformer.self_attn.k_proj", "k", "2*hidden", "kv", blocked_reason=SHARED_WEIGHT),
                Linear("shared_transformer.self_attn.v_proj", "v", "2*hidden", "kv", blocked_reason=SHARED_WEIGHT),
                Linear("shared_transformer.self_attn.o_proj", "o", "q", "hidden", blocked_reason=SHARED_WEIGHT),
                Linear(
                    "shared_transformer.feed_forward.gate_up_proj",
                    "gate_up",
                    "hidden",
                    "2*ffn",
                    blocked_reason=SHARED_WEIGHT,
                ),
                Linear(
                    "shared_transformer.feed_forward.down_proj", "down", "ffn", "hidden", blocked_reason=SHARED_WEIGHT
                ),
            ),
            (rms("shared_transformer.input_layernorm", "2*hidden"), rms("shared_transformer.pre_ff_layernorm")),
            kind="shared",
        ),
        BlockPart(
            weights=(
                Weight(
                    "shared_transformer.feed_forward.gate_up_proj_adapter_list",
                    "num_hybrid*adapter_rank*(hidden+2*ffn)",
                    "shared adapters",
                ),
            ),
            kind="adapters",
        ),
        BlockPart(
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
        kinds=zamba2_kinds,
        positions=lambda sizes: "rope" if sizes.flag("use_mem_rope") else "none",
        refuses={**_NO_PREFIX, "ln": f"its attention blocks share their norms: {SHARED_WEIGHT}"},
        packs=False,
        mind=(PACKING_NOTE, IN_PROJ_NOTE, f"its attention blocks share their weights: {SHARED_WEIGHT}"),
        kernels=KERNELS,
    ),
    decoder(
        "Nemotron-H",
        ("nemotron_h",),
        norms("norm"),
        mamba2("mixer", kind="mamba"),
        attention("mixer", kind="attention"),
        BlockPart(
            (Linear("mixer.up_proj", "up", "hidden", "ffn"), Linear("mixer.down_proj", "down", "ffn", "hidden")),
            kind="mlp",
        ),
        experts(
            *("mixer.experts", "n_routed_experts", "moe_intermediate_size"),
            kind="moe",
            fused=False,
            hidden="expert_hidden",
        ),
        BlockPart(
            (
                Linear("mixer.fc1_latent_proj", "latent_in", "hidden", "moe_latent_size", "mlp_bias"),
                Linear("mixer.fc2_latent_proj", "latent_out", "moe_latent_size", "hidden", "mlp_bias"),
            ),
            kind="latent moe",
        ),
        BlockPart(
            (
                Linear("mixer.shared_experts.up_proj", "up", "hidden", "moe_shared_expert_intermediate_size"),
                Linear("mixer.shared_experts.down_proj", "down", "moe_shared_expert_intermediate_size", "hidden"),
            ),
            (Weight("mixer.gate", "n_routed_experts*hidden", "router"),),
            kind="moe",
        ),
        heads=LM,
        outside=(rms("model.norm_f"),),
        embeddings="embeddings",
        sizes={
            "layers": lambda sizes: len(nemotron_kinds(sizes)),
            "expert_hidden": ("moe_latent_size", "hidden"),
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
        kinds=nemotron_kinds,
        positions="none",
        refuses=_NO_PREFIX,
        packs=False,
        activation=("mlp_hidden_act", "relu2"),
        mind=(PACKING_NOTE, IN_PROJ_NOTE),
        kernels=KERNELS,
    ),
    decoder(
        "Qwen3-Next",
        ("qwen3_next",),
        BlockPart(
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
        BlockPart(
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
        gated_ffn(kind="dense", by_parameter=True),
        experts("mlp.experts", "num_experts", "moe_intermediate_size", kind="moe"),
        gated_ffn("mlp.shared_expert", ffn="shared_expert_intermediate_size", kind="moe", by_parameter=True),
        BlockPart(
            (Linear("mlp.shared_expert_gate", "router", "hidden", "1"),),
            (Weight("mlp.gate", "num_experts*hidden", "router"),),
            kind="moe",
        ),
        PRE_NORMS,
        sizes={
            "linear_k": "linear_num_key_heads*linear_key_head_dim",
            "linear_v": "linear_num_value_heads*linear_value_head_dim",
        },
        defaults={"full_attention_interval": 4, "decoder_sparse_step": 1, "linear_conv_kernel_dim": 4, "head_dim": 256},
        kinds=qwen3_next_kinds,
        refuses=_NO_PREFIX,
        packs=False,
        mind=(PACKING_NOTE,),
        kernels=("fla", "causal_conv1d"),
    ),
)
