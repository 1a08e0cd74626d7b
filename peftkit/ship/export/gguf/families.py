"""GGUF families as data: names of sizes, layout of weights, and what llama.cpp cannot compute.

Keys of `sizes` and `numbers` are those of the GGUF header without the architecture in front; values name keys
of config.json. Tensor names come from the gguf package. Every entry is measured against llama.cpp in
tests/ship/gguf/test_parity.py; docs/gguf.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_DECODER = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SILU = {"hidden_act": ("silu",)}
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class GgufFamily:
    """Row of a family: how transformers' configuration and weights become llama.cpp's."""

    model_types: tuple[str, ...]
    architecture: str  # llama.cpp's name
    sizes: Mapping[str, str] = field(default_factory=lambda: _DECODER)
    numbers: Mapping[str, str] = field(default_factory=lambda: _RMS)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _SILU)  # the values it can compute
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    context: str = "max_position_embeddings"
    interleaved: Mapping[str, str] = field(default_factory=dict)  # module -> the key of its number of heads
    transposed: tuple[str, ...] = ()  # Conv1D: (in, out) on disk
    norm_offset: float = 0.0  # llama.cpp multiplies by the norm's weight, transformers by weight + offset
    drops_window: bool = False  # llama.cpp attends to everything: right up to the window's length
    full_every: int = 0  # every n-th layer attends to everything, the others to the window
    wide_layers: int = 0  # with this many layers queries are scaled by hidden_size / heads, not by head_dim
    can_untie_head: bool = True  # can hold an output matrix that is not the embedding


FAMILIES = (
    GgufFamily(
        ("llama", "mistral"),
        "llama",
        rope_types=("default", "llama3", "linear", "yarn"),
        # the two halves of each rotary head lie interleaved
        interleaved={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
        drops_window=True,
    ),
    GgufFamily(("qwen2",), "qwen2", drops_window=True),
    GgufFamily(("qwen3",), "qwen3", only={**_SILU, "attention_bias": (False,)}, drops_window=True),
    GgufFamily(
        ("gemma",),
        "gemma",
        only={"hidden_act": _GELU_TANH, "attention_bias": (False,), "use_bidirectional_attention": (None, False)},
        rope_types=("default",),
        norm_offset=1.0,
        can_untie_head=False,
    ),
    GgufFamily(
        ("gemma2",),
        "gemma2",
        sizes={**_DECODER, **_WINDOW},
        numbers={
            **_RMS,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        only={
            "hidden_activation": _GELU_TANH,
            "attention_bias": (False,),
            "use_bidirectional_attention": (None, False),
        },
        rope_types=("default",),
        norm_offset=1.0,
        full_every=2,
        wide_layers=46,
        can_untie_head=False,
    ),
    GgufFamily(
        ("gemma3_text",),
        "gemma3",
        sizes={**_DECODER, **_WINDOW},
        only={
            "hidden_activation": _GELU_TANH,
            "attention_bias": (False,),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (None, False),
        },
        rope_types=("default", "linear"),
        norm_offset=1.0,
        full_every=6,
        wide_layers=62,
        can_untie_head=False,
    ),
    GgufFamily(("phi3",), "phi3", rope_types=("default",), drops_window=True),
    GgufFamily(
        ("gpt2",),
        "gpt2",
        sizes={
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
        },
        numbers={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        only={
            "activation_function": _GELU_TANH,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        rope_types=(),
        context="n_positions",
        transposed=("c_attn", "c_proj", "c_fc"),
    ),
)


def gguf_family(model_type: str) -> GgufFamily | None:
    """Return the row of a `model_type`, or None where it was never verified against llama.cpp."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
