"""Families that keep a state: RWKV, Mamba and its kin, and hybrids of state layers with attention."""

from __future__ import annotations

from collections.abc import Callable

from peftkit.archs.families.pieces import (
    FUSED_KERNEL,
    LM,
    MIXED_CACHE,
    NEVER_CALLED,
    NO_KEY_VALUES,
    PRE_NORMS,
    attention,
    decoder,
    experts,
    gated,
    layer_norm,
    norms,
    rms,
)
from peftkit.archs.family import SHARED, Family, Linear, Part, Weight
from peftkit.archs.sizes import Sizes

_NO_PREFIX = {"prefix": NO_KEY_VALUES}
_MIXED = {"prefix": MIXED_CACHE}
_LEAKS = "packed documents run into each other: the state is carried across"
_KERNELS = ("mamba_ssm", "causal_conv1d")
_IN_ONLY = "only in_proj is always called as a layer: it is the one state projection that is adapted"


def _mamba(place: str, *, kind: str = "", normed: bool = False) -> Part:
    """A Mamba mixer (Gu and Dao 2023)."""
    weights = (
        Weight(f"{place}.A_log", "inner*state", "states"),
        Weight(f"{place}.D", "inner", "states"),
        Weight(f"{place}.conv1d", "inner*kernel+inner", "states"),
    )
    if normed:
        weights += (
            rms(f"{place}.dt_layernorm", "dt_rank"),
            rms(f"{place}.b_layernorm", "state"),
            rms(f"{place}.c_layernorm", "state"),
        )
    return Part(
        (
            Linear(f"{place}.in_proj", "ssm_in", "hidden", "2*inner"),
            Linear(f"{place}.x_proj", "ssm_x", "inner", "dt_rank+2*state", blocked=FUSED_KERNEL),
            Linear(f"{place}.dt_proj", "ssm_dt", "dt_rank", "inner", True, blocked=NEVER_CALLED),
            Linear(f"{place}.out_proj", "ssm_out", "inner", "hidden", blocked=FUSED_KERNEL),
        ),
        weights,
        kind=kind,
        state="inner*state+inner*kernel",
    )


def _mamba2(place: str, *, kind: str = "", norm: bool = True) -> Part:
    """A Mamba-2 mixer (Dao and Gu 2024)."""
    weights = (
        Weight(f"{place}.A_log", "ssm_heads", "states"),
        Weight(f"{place}.D", "ssm_heads", "states"),
        Weight(f"{place}.dt_bias", "ssm_heads", "states"),
        Weight(f"{place}.conv1d", "(inner+2*groups*state)*(kernel+1)", "states"),
    )
    return Part(
        (
            Linear(
                f"{place}.in_proj", "ssm_in", "hidden", "2*inner+2*groups*state+ssm_heads", "mamba_proj_bias"
            ),
            Linear(
                f"{place}.out_proj", "ssm_out", "inner", "hidden", "mamba_proj_bias", blocked=FUSED_KERNEL
            ),
        ),
        (*weights, rms(f"{place}.norm", "inner")) if norm else weights,
        kind=kind,
        state="inner*state+(inner+2*groups*state)*kernel",
    )


def _dt_rank(key: str) -> Callable[[Sizes], int]:
    def value(sizes: Sizes) -> int:
        return -(-sizes["hidden"] // 16) if sizes.key(key) in {None, "auto"} else sizes[key]

    return value


_MAMBA_SIZES = {
    "inner": ("intermediate_size", "expand*hidden"),
    "state": "state_size",
    "kernel": "conv_kernel",
    "dt_rank": _dt_rank("time_step_rank"),
    "heads": "1",
    "head_dim": "hidden",
    "ffn": "inner",
    "positions": "0",
}
_MAMBA_DEFAULTS = {"expand": 2, "state_size": 16, "conv_kernel": 4, "time_step_rank": "auto"}
_HYBRID_SIZES = {
    "inner": "ssm_heads*ssm_head_dim",
    "state": "mamba_d_state",
    "groups": "mamba_n_groups",
    "kernel": "mamba_d_conv",
    "ssm_heads": "mamba_n_heads",
    "ssm_head_dim": "mamba_d_head",
}


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
    num_shared, adapts_attention = sizes["num_mem_blocks"], sizes.key("use_shared_attention_adapter")
    for kind in sizes.key("layers_block_type") or ():
        if kind != "hybrid":
            found.append(frozenset({"mamba"}))
            continue
        seen = sum("hybrid" in kinds for kinds in found)
        new = {"shared"} if seen < num_shared else set()
        if seen == 0:
            new |= {"adapters", "attention adapters"} if adapts_attention else {"adapters"}
        found.append(frozenset({"hybrid", *new}))
    return found


_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_NEWER_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}


def _nemotron(sizes: Sizes) -> list[frozenset[str]]:
    """Each layer is one mixer; hub files write the pattern as a string."""
    pattern = sizes.key("hybrid_override_pattern")
    kinds = [_PATTERN[letter] for letter in pattern] if pattern else sizes.key("layers_block_type") or ()
    return [frozenset({_NEWER_NAMES.get(kind, str(kind))}) for kind in kinds]


def _qwen3_next(sizes: Sizes) -> list[frozenset[str]]:
    every, listed = sizes["full_attention_interval"], sizes.key("layer_types")
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
        "RWKV",
        ("rwkv",),
        Part(
            (
                Linear("attention.key", "k", "hidden", "attention_hidden"),
                Linear("attention.value", "v", "hidden", "attention_hidden"),
                Linear("attention.receptance", "r", "hidden", "attention_hidden"),
                Linear("attention.output", "o", "attention_hidden", "hidden"),
                Linear("feed_forward.key", "up", "hidden", "ffn"),
                Linear("feed_forward.receptance", "r", "hidden", "hidden"),
                Linear("feed_forward.value", "down", "ffn", "hidden"),
            ),
            (
                Weight("attention.time", "2*attention_hidden+3*hidden", "states"),
                Weight("feed_forward.time", "2*hidden", "states"),
                layer_norm("ln1"),
                layer_norm("ln2"),
            ),
            state="5*hidden",
        ),
        Part(weights=(layer_norm("pre_ln"),), kind="first"),
        block="rwkv.blocks.{i}",
        heads=LM,
        outside=(layer_norm("rwkv.ln_out"),),
        embeddings="embeddings",
        head="head",
        sizes={
            "attention_hidden": ("attention_hidden_size", "hidden"),
            "heads": "1",
            "head_dim": "attention_hidden",
            "positions": "0",
        },
        kinds=lambda sizes: [frozenset({"first"}) if i == 0 else frozenset() for i in range(sizes["layers"])],
        positions="none",
        norm="LayerNorm",
        activation=("", "squared ReLU"),
        refuses=_NO_PREFIX,
        packs=False,
        batches_generation=False,
        overrides={"rescale_every": 0},
        mind=(
            _LEAKS,
            "its step-by-step decoding is wrong for several prompts at once: prompts are answered one by one",
            "rescale_every is set to 0: it would halve weights at evaluation, and adapters beside them not",
            "training runs a loop over tokens where its CUDA kernel is missing: slow",
        ),
    ),
    *(
        decoder(
            name,
            (model_type,),
            _mamba("mixer"),
            norms("norm"),
            block="backbone.layers.{i}",
            heads=LM,
            outside=(rms("backbone.norm_f"),),
            embeddings="embeddings",
            tied_by_default=True,
            sizes=_MAMBA_SIZES,
            defaults=_MAMBA_DEFAULTS,
            positions="none",
            refuses=_NO_PREFIX,
            packs=False,
            cached_prompts=False,
            mind=(_LEAKS, _IN_ONLY),
            kernels=_KERNELS,
            skip_4bit=skip,
        )
        for name, model_type, skip in (
            ("Mamba", "mamba", ("dt_proj",)),  # multiplied as a matrix, which packed bytes are not
            ("FalconMamba", "falcon_mamba", ()),
        )
    ),
    decoder(
        "Mamba-2",
        ("mamba2",),
        _mamba2("mixer"),
        norms("norm"),
        block="backbone.layers.{i}",
        heads=LM,
        outside=(rms("backbone.norm_f"),),
        embeddings="embeddings",
        sizes={
            "inner": "expand*hidden",
            "state": "state_size",
            "groups": "n_groups",
            "kernel": "conv_kernel",
            "ssm_heads": "num_heads",
            "heads": "1",
            "head_dim": "hidden",
            "ffn": "inner",
            "positions": "0",
        },
        defaults={"expand": 2, "state_size": 128, "n_groups": 8, "conv_kernel": 4, "num_heads": 128},
        positions="none",
        refuses=_NO_PREFIX,
        packs=False,
        cached_prompts=False,
        mind=(_LEAKS, _IN_ONLY),
        kernels=_KERNELS,
    ),
    decoder(
        "Jamba",
        ("jamba",),
        attention(kind="attention"),
        _mamba("mamba", kind="mamba", normed=True),
        gated("feed_forward", kind="dense"),
        experts("feed_forward.experts", "num_experts", "ffn", kind="moe"),
        Part(weights=(Weight("feed_forward.router", "num_experts*hidden", "router"),), kind="moe"),
        norms("input_layernorm", "pre_ff_layernorm"),
        outside=(rms("model.final_layernorm"),),
        sizes={
            "inner": "mamba_expand*hidden",
            "state": "mamba_d_state",
            "kernel": "mamba_d_conv",
            "dt_rank": _dt_rank("mamba_dt_rank"),
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
        mind=(_LEAKS, _IN_ONLY),
        kernels=_KERNELS,
    ),
    decoder(
        "Bamba",
        ("bamba",),
        attention(kind="attention"),
        _mamba2("mamba", kind="mamba"),
        gated("feed_forward"),
        norms("input_layernorm", "pre_ff_layernorm"),
        heads=LM,
        outside=(rms("model.final_layernorm"),),
        sizes=_HYBRID_SIZES,
        kinds=_bamba,
        refuses=_MIXED,
        packs=False,
        cached_prompts=False,
        mind=(_LEAKS, _IN_ONLY),
        kernels=_KERNELS,
    ),
    decoder(
        "Falcon-H1",
        ("falcon_h1",),
        attention(bias="attention_bias", o_bias="attention_bias"),
        _mamba2("mamba", norm=False),
        gated("feed_forward", bias="mlp_bias"),
        norms("input_layernorm", "pre_ff_layernorm"),
        Part(weights=(rms("mamba.norm", "inner"),), kind="normed"),
        heads=LM,
        outside=(rms("model.final_layernorm"),),
        sizes={**_HYBRID_SIZES, "inner": ("mamba_d_ssm", "mamba_expand*hidden")},
        defaults={"mamba_expand": 2},
        kinds=lambda sizes: [frozenset({"normed"} if sizes.key("mamba_rms_norm") else ())] * sizes["layers"],
        refuses=_MIXED,
        packs=False,
        mind=(_LEAKS, _IN_ONLY),
        kernels=_KERNELS,
    ),
    decoder(
        "Zamba2",
        ("zamba2",),
        _mamba2("mamba", kind="mamba"),
        norms("input_layernorm", kind="mamba"),
        _mamba2("mamba_decoder.mamba", kind="hybrid"),
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
            "num_hybrid": lambda sizes: list(sizes.key("layers_block_type") or ()).count("hybrid"),
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
        refuses={**_MIXED, "ln": f"its attention blocks share their norms: {SHARED}"},
        packs=False,
        mind=(_LEAKS, _IN_ONLY, f"its attention blocks are shared: {SHARED}"),
        kernels=_KERNELS,
    ),
    decoder(
        "Nemotron-H",
        ("nemotron_h",),
        norms("norm"),
        _mamba2("mixer", kind="mamba"),
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
        defaults={"head_dim": 128},
        kinds=_nemotron,
        positions="none",
        refuses=_MIXED,
        packs=False,
        activation=("mlp_hidden_act", "relu2"),
        mind=(_LEAKS, _IN_ONLY),
        kernels=_KERNELS,
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
        mind=(_LEAKS,),
        kernels=("fla", "causal_conv1d"),
    ),
)
