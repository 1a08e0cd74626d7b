"""Write tiny GGUF files with the `gguf` package, as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA2_BLOCK = {
    **_BLOCK,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _name(parameter: str, block: dict[str, str]) -> str:
    module, kind = parameter.rsplit(".", 1)
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{block[rest]}.{kind}"


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of each rotary head interleaved."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


_PRE = {"llama": "gpt-2", "qwen2": "qwen2"}


def add_tokens(writer: Any, architecture: str, size: int, tokenizer_file: Path) -> None:
    """Byte-level BPE for llama and qwen2, sentencepiece for gemma."""
    if architecture == "gemma2":
        pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        letters = [chr(c) for c in range(33, 127)]
        pieces += ["\u2581", *letters, *(f"\u2581{c}" for c in "abcdefgrt"), "re", "tu", "rn", "retu", "return"]
        kinds = [3, 3, 3, 2, *[6] * 256, *[1] * (len(pieces) - 260)]
        pieces += [f"<unused{i}>" for i in range(size - len(pieces))]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([-float(i) for i in range(size)])
        writer.add_token_types([*kinds, *[5] * (size - len(kinds))])
        writer.add_bos_token_id(2)
        writer.add_unk_token_id(3)
    else:
        spec = json.loads(tokenizer_file.read_text())
        special = {token["id"] for token in spec["added_tokens"]}
        by_id = {
            **{i: t for t, i in spec["model"]["vocab"].items()},
            **{token["id"]: token["content"] for token in spec["added_tokens"]},
        }
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_PRE[architecture])
        writer.add_token_list([by_id[i] for i in range(size)])
        writer.add_token_types([3 if i in special else 1 for i in range(size)])
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
        writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)


def write_gguf(path: Path, model: Any, architecture: str, tokenizer_file: Path) -> Path:
    """A llama, qwen2 or gemma2 model in float32 with a byte-level BPE tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "gemma2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    add_tokens(writer, architecture, config.vocab_size, tokenizer_file)
    block = _GEMMA2_BLOCK if architecture == "gemma2" else _BLOCK
    for parameter, tensor in model.named_parameters():
        weight = tensor.detach().float().numpy()
        if architecture == "llama" and "q_proj" in parameter:
            weight = _permuted(weight, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in parameter:
            weight = _permuted(weight, config.num_key_value_heads)
        if architecture == "gemma2" and "norm" in parameter:
            weight = weight + 1
        writer.add_tensor(_name(parameter, block), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
