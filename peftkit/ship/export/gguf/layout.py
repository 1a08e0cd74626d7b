"""Names and layout of weights: transformers' module -> llama.cpp's tensor, for models and adapters alike."""

from __future__ import annotations

from typing import Any

from peftkit.ship.export.gguf.source import GgufSource


def gguf_tensor_names(source: GgufSource) -> dict[str, str]:
    """Return transformers' parameter name -> llama.cpp's tensor name, for all that the model needs."""
    import gguf

    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    num_blocks = int(source.config[source.family.sizes["block_count"]])
    table = gguf.get_tensor_name_map(by_name[source.family.architecture], num_blocks)
    names = {}
    for name in (*source.shapes, *source.aliases):
        gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is not None:
            names[name] = gguf_name
        elif name in source.shapes or source.family.can_untie_head:
            raise KeyError(f"gguf knows no {name} of {source.family.architecture}: the family's row is wrong")
    return names


def _module_name(name: str) -> str:
    return name.split(".")[-2] if "." in name else ""


def is_transposed(source: GgufSource, name: str) -> bool:
    """Return whether a parameter is stored as (in, out)."""
    return name.endswith(".weight") and _module_name(name) in source.family.transposed


def linear_shape(source: GgufSource, name: str) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer's weight, in either layout."""
    rows, columns = source.shapes[name]
    return (columns, rows) if is_transposed(source, name) else (rows, columns)


def interleave(source: GgufSource, name: str, rows: Any) -> Any:
    """Reorder the output rows of a query or key (weight, bias, or LoRA B) where llama.cpp rotates neighbours.

    transformers pairs row i of a head with row i + head_dim / 2; llama.cpp's Llama pairs 2i with 2i + 1.

    one head of head_dim 6   [0, 1, 2, 3, 4, 5] -> [0, 3, 1, 4, 2, 5]
    """
    key = source.family.interleaved.get(_module_name(name))
    if key is None:
        return rows
    num_heads = int(source.config[key])
    return (
        rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    )


def to_gguf_layout(source: GgufSource, name: str, tensor: Any) -> Any:
    """Return a model's parameter in llama.cpp's layout."""
    if is_transposed(source, name):
        return tensor.T
    if source.family.norm_offset and tensor.ndim == 1 and name.endswith("norm.weight"):
        return tensor.float() + source.family.norm_offset  # in fp32: bf16 would round the sum
    return interleave(source, name, tensor)
