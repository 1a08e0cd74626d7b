"""Arithmetic of merging: edits applied to a weight in fp32, rounded once at the end.

Pure functions of tensors. `read` returns a tensor of the adapter's file by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from peftkit.model.adapter.edits import Edit
from peftkit.model.meta.layout import Placement

TensorReader = Callable[[str], torch.Tensor]
_SLICE_NUMBERS, _SLICE_ROWS = 2**20, 64  # added at a time: 4 MiB in fp32


def merge_weight(
    weight: torch.Tensor, edits: Sequence[Edit], read: TensorReader, *, place: Placement, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weight with all edits in `dtype`, rounded once. `weight` may be overwritten."""
    if not edits:
        return weight.to(dtype)
    if [edit.kind for edit in edits] == ["whole"]:
        return _replacement(edits[0], read, place).to(dtype)
    if len(edits) == 1 and edits[0].kind in {"lora", "embedding"} and weight.dtype == dtype:
        return _add_low_rank(weight, edits[0], read)
    if len(edits) == 1 and edits[0].is_additive and weight.dtype == dtype:
        # in place and slice by slice: no third copy of the weight is made
        delta = edit_delta(edits[0], read, place=place, shape=weight.shape)
        rows = max(1, _SLICE_NUMBERS // max(1, weight[0].numel())) if weight.ndim else 1
        for weight_slice, delta_slice in zip(torch.split(weight, rows), torch.split(delta, rows), strict=True):
            weight_slice.copy_(weight_slice.to(delta.dtype) + delta_slice)
        return weight
    return apply_edits(weight, edits, read, place=place).to(dtype)


def _add_low_rank(weight: torch.Tensor, edit: Edit, read: TensorReader) -> torch.Tensor:
    """Add s B A to W in place, slice by slice: the product never exists in memory as a whole.

    A slice of a product has the bits of the whole: each number is a sum over the rank, in the same order.
    """
    a, b, transposed = _lora_factors(edit, read)
    step = max(_SLICE_ROWS, _SLICE_NUMBERS // weight.shape[1] // _SLICE_ROWS * _SLICE_ROWS)
    buffer = torch.empty((step, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        target = weight[start : start + step]
        product = (b @ a[:, start : start + step]).T if transposed else b[start : start + step] @ a
        slice_sum = buffer[: len(target)]
        slice_sum.copy_(target)
        target.copy_(slice_sum.add_(product.mul_(edit.scale)))
    return weight


def apply_edits(weight: torch.Tensor, edits: Iterable[Edit], read: TensorReader, *, place: Placement) -> torch.Tensor:
    """Return the weight with all edits, in fp32 (fp64 where the weight is).

    DoRA: m (W + s B A) / ||W + s B A||, the norm over the inputs of each output.
    """
    value = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for edit in edits:
        if edit.kind == "whole":
            value = _replacement(edit, read, place).to(value.dtype)
        elif edit.kind == "scale":
            vector = read(edit.tensors["value"]).to(value.dtype)
            if value.ndim == 1:
                value = value * vector.reshape(-1)
            else:
                along_columns = edit.scales_inputs != edit.transposed  # W is (d_out, d_in), or (d_in, d_out)
                value = value * (vector.reshape(1, -1) if along_columns else vector.reshape(-1, 1))
        elif edit.kind == "rows":
            rows = read(edit.tensors["value"]).to(value.dtype)
            value = value.index_copy(0, torch.tensor(edit.ids), rows)
        elif edit.kind == "dora":
            adapted = value + low_rank_delta(edit, read)
            by_output = adapted.T if edit.transposed else adapted
            magnitude = read(edit.tensors["magnitude"]).to(value.dtype)
            factor: torch.Tensor = magnitude / torch.linalg.norm(by_output, dim=1)
            value = adapted * (factor.view(1, -1) if edit.transposed else factor.view(-1, 1))
        else:
            value = value + edit_delta(edit, read, place=place, shape=value.shape)
    return value


def _replacement(edit: Edit, read: TensorReader, place: Placement) -> torch.Tensor:
    """Return what replaces the weight; of fused experts the part that the weight is."""
    value = read(edit.tensors["value"])
    if place.expert is None:
        return value
    size = value.shape[1 + place.axis] // place.num_parts
    return value[place.expert].narrow(place.axis, place.part * size, size)


def edit_delta(edit: Edit, read: TensorReader, *, place: Placement, shape: Sequence[int]) -> torch.Tensor:
    """Return what an additive edit adds to a weight of `shape`, in fp32; `place` names the expert's part."""
    if edit.kind == "shift":
        return read(edit.tensors["value"]).float() * edit.scale
    if edit.kind == "experts":
        return _expert_delta(edit, read, place, shape)
    if edit.kind == "vera":
        # return VeRA's b (B A d), of the first rows of the shared B and columns of the shared A
        shape = shape[::-1] if edit.transposed else shape
        b, d = (read(edit.tensors[part]).float().unsqueeze(-1) for part in ("b", "d"))
        shared_a, shared_b = read(edit.tensors["A"]).float(), read(edit.tensors["B"]).float()
        product = (b * shared_b[: shape[0]]) @ (d * shared_a[:, : shape[1]])
        return product.T if edit.transposed else product
    return low_rank_delta(edit, read)


def low_rank_delta(edit: Edit, read: TensorReader) -> torch.Tensor:
    """Return s B A in fp32, in the layout of the weight."""
    a, b, transposed = _lora_factors(edit, read)
    product = b @ a
    return (product.T if transposed else product).mul_(edit.scale)


def _lora_factors(edit: Edit, read: TensorReader) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return A and B in fp32, and whether the weight holds their product transposed."""
    a, b = read(edit.tensors["A"]).float(), read(edit.tensors["B"]).float()
    if "E" in edit.tensors:
        a = a * read(edit.tensors["E"]).float()
    return a, b, edit.transposed or edit.kind == "embedding"


def _expert_delta(edit: Edit, read: TensorReader, place: Placement, shape: Sequence[int]) -> torch.Tensor:
    """Return s B[e] A[e] of one expert's part, or of all experts with shape (num_experts, ., .).

    PEFT stacks A (num_experts x rank, d_in) by expert, and B (d_out, rank x num_experts) by rank.
    """
    num_experts = shape[0] if place.expert is None else place.num_experts
    a, b = read(edit.tensors["A"]).float(), read(edit.tensors["B"]).float()
    by_expert, by_rank = a.reshape(num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, num_experts)

    def delta_of(expert: int) -> torch.Tensor:
        product = (by_rank[:, :, expert] @ by_expert[expert]).mul_(edit.scale)
        return product.T if edit.transposed else product

    if place.expert is None:
        deltas = torch.empty(tuple(shape))
        for expert in range(num_experts):
            deltas[expert] = delta_of(expert)
        return deltas
    delta = delta_of(place.expert)
    size = delta.shape[place.axis] // place.num_parts
    return delta.narrow(place.axis, place.part * size, size)
