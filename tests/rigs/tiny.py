"""Tiny models of every family, made on the spot with transformers' own classes."""

from __future__ import annotations

import zlib
from typing import Any

VOCAB = 256
HIDDEN = 64  # bitsandbytes quantizes in blocks of 64
LABELS = 3
_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {
    **_IDS,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_HEAD = {**_GQA, "head_dim": 16}
_GEMMA = _HEAD
_MAMBA = {**_IDS, "hidden_size": HIDDEN, "state_size": 8, "num_hidden_layers": 2}
_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
_LATENT = {
    **{**_BASE, "num_hidden_layers": 3},
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": HIDDEN,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_T5 = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "mistral": {**_GQA, "sliding_window": 32},
    "qwen2": _GQA,
    "qwen3": _HEAD,
    "smollm3": _GQA,
    "granite": _GQA,
    "olmo2": _GQA,
    "cohere": _GQA,
    "cohere2": _GQA,
    "glm": _HEAD,
    "glm4": _HEAD,
    "starcoder2": _GQA,
    "gemma": _HEAD,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi": _BASE,
    "phi3": _GQA,
    "gpt2": {**_IDS, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": _BASE,
    "falcon": {
        **_IDS,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
    },
    "bloom": {**_IDS, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4},
    "mpt": {**_IDS, "d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_HEAD, **_MOE, "num_experts": 4},
    "deepseek_v2": {**_LATENT, "n_shared_experts": 2},
    "deepseek_v3": {**_LATENT, "n_shared_experts": 1},
    "gpt_oss": {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        **_HEAD,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 2,
    },
    "rwkv": {
        **_IDS,
        "hidden_size": HIDDEN,
        "attention_hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "context_length": 128,
    },
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "jamba": {
        **_GQA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "bamba": {**_GQA, **_HYBRID, "attn_layer_indices": [1]},
    "falcon_h1": {**_GQA, **_HYBRID, "mamba_d_ssm": 128},
    "zamba2": {
        **{**_BASE, "num_hidden_layers": 3},
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "use_mamba_kernels": False,
        "adapter_rank": 4,
    },
    "nemotron_h": {
        **{key: value for key, value in _HEAD.items() if key != "num_hidden_layers"},
        **_MOE,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": HIDDEN,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **_HEAD,
        **_MOE,
        "num_experts": 4,
        "shared_expert_intermediate_size": HIDDEN,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "t5": _T5,
    "umt5": _T5,
    "bart": {
        **_IDS,
        "d_model": HIDDEN,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 128,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
    "bert": _BASE,
    "roberta": _BASE,
    "xlm-roberta": _BASE,
    "distilbert": {
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "dim": HIDDEN,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 128,
        "max_position_embeddings": 128,
    },
    "modernbert": _BASE,
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """transformers' configuration of a model of about a hundred thousand parameters, without dropout."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **{**TINY[model_type], "num_labels": LABELS, **changes})
    for name in list(config.to_dict()):
        if "dropout" in name or name.endswith("_pdrop"):
            config.update({name: 0.0})
    return config


def tiny_model(model_type: str, task: str = "causal-lm", **changes: Any) -> Any:
    """A random model of the family, in evaluation mode.

    Matrices are drawn wider than the libraries do: at this size theirs give nearly flat logits.
    """
    import torch
    import transformers

    from peftkit.model.base.unknown_family import AUTO_CLASSES

    auto = getattr(transformers, AUTO_CLASSES[task])
    model = auto.from_config(tiny_config(model_type, **changes)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv1d" not in name and "A_log" not in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) & 0x7FFFFFFF)
                parameter.normal_(0, 0.15, generator=generator)
    return model
