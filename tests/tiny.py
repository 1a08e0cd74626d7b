"""Tiny models of every family, made on the spot with transformers' own classes."""

from __future__ import annotations

from typing import Any

VOCAB = 256
_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"},
    "gemma": {**_LLAMA_LIKE, "head_dim": 32},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 32},
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 32},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 32},
}


def tiny_config(model_type: str) -> Any:
    """transformers' configuration of a model of about a hundred thousand parameters."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **_SPECIAL.get(model_type, _LLAMA_LIKE))


def tiny_model(model_type: str, seed: int = 0) -> Any:
    """A random model of the family, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
