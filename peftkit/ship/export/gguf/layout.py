"""Names and layout of weights: transformers' module -> llama.cpp's tensor, for models and adapters alike."""

from __future__ import annotations

from typing import Any

from peftkit.ship.export.gguf.source import Source


def tensor_names(source: Source) -> dict[str, str]:
    """transformers' parameter name -> llama.cpp's tensor name, for all that the model needs."""
    import gguf

    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = int(source.config[source.family.sizes["block_count"]])
    table = gguf.get_tensor_name_map(by_name[source.family.architecture], blocks)
    names = {}
    for name in (*source.shapes, *source.aliases):
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is not None:
            names[name] = found
        elif name in source.shapes or source.family.own_head:
            raise KeyError(f"gguf knows no {name} of {source.family.architecture}: the family's row is wrong")
    return names


def _module(name: str) -> str:
    return name.split(".")[-2] if "." in name else ""


def is_transposed(source: Source, name: str) -> bool:
    """Whether a parameter lies as (in, out)."""
    return name.endswith(".weight") and _module(name) in source.family.transposed


def out_in(source: Source, name: str) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer's weight, however it lies."""
    rows, columns = source.shapes[name]
    return (columns, rows) if is_transposed(source, name) else (rows, columns)


def interleave(source: Source, name: str, rows: Any) -> Any:
    """Reorder the output rows of a query or key (weight, bias, or LoRA B) where llama.cpp rotates neighbours.

    transformers pairs row i of a head with row i + head_dim / 2; llama.cpp's Llama pairs 2i with 2i + 1.
    """
    key = source.family.interleaved.get(_module(name))
    if key is None:
        return rows
    heads = int(source.config[key])
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def laid_out(source: Source, name: str, tensor: Any) -> Any:
    """A model's parameter as llama.cpp reads it."""
    if is_transposed(source, name):
        return tensor.T
    if source.family.norm_offset and tensor.ndim == 1 and name.endswith("norm.weight"):
        return tensor.float() + source.family.norm_offset  # in fp32: bf16 would round the sum
    return interleave(source, name, tensor)
