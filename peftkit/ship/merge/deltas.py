"""The arithmetic of merging: what an edit makes of a weight, in fp32, rounded once at the end.

Pure functions of tensors. `read` gives a tensor of the adapter's file by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from peftkit.model.adapter.edits import Edit
from peftkit.model.meta.layout import Place

Read = Callable[[str], torch.Tensor]
_SLICE_NUMBERS, _SLICE_ROWS = 2**20, 64  # added at a time: 4 MiB in fp32


def merged(
    weight: torch.Tensor, edits: Sequence[Edit], read: Read, *, place: Place, dtype: torch.dtype
) -> torch.Tensor:
    """The weight with all edits, in `dtype`, rounded once. `weight` may be overwritten."""
    if not edits:
        return weight.to(dtype)
    if [edit.kind for edit in edits] == ["whole"]:
        return _whole(edits[0], read, place).to(dtype)
    if len(edits) == 1 and edits[0].kind in {"lora", "embedding"} and weight.dtype == dtype:
        return _plus_low_rank(weight, edits[0], read)
    if len(edits) == 1 and edits[0].adds and weight.dtype == dtype:
        return _plus(weight, added(edits[0], read, place=place, shape=weight.shape))
    return changed(weight, edits, read, place=place).to(dtype)


def _plus_low_rank(weight: torch.Tensor, edit: Edit, read: Read) -> torch.Tensor:
    """W + s B A, in place and slice by slice: the product never stands in memory as a whole.

    A slice of a product has the bits of the whole: each number is a sum over the rank, in the same order.
    """
    a, b, turned = _factors(edit, read)
    step = max(_SLICE_ROWS, _SLICE_NUMBERS // weight.shape[1] // _SLICE_ROWS * _SLICE_ROWS)
    sums = torch.empty((step, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        target = weight[start : start + step]
        product = (b @ a[:, start : start + step]).T if turned else b[start : start + step] @ a
        found = sums[: len(target)]
        found.copy_(target)
        target.copy_(found.add_(product.mul_(edit.scale)))
    return weight


def _plus(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The sum, in place and slice by slice: no third copy of the weight is made."""
    rows = max(1, _SLICE_NUMBERS // max(1, weight[0].numel())) if weight.ndim else 1
    for target, part in zip(torch.split(weight, rows), torch.split(delta, rows), strict=True):
        target.copy_(target.to(delta.dtype) + part)
    return weight


def changed(weight: torch.Tensor, edits: Iterable[Edit], read: Read, *, place: Place) -> torch.Tensor:
    """The weight with all edits, in fp32 (fp64 where the weight is)."""
    value = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for edit in edits:
        value = _apply(value, edit, read, place)
    return value


def _apply(value: torch.Tensor, edit: Edit, read: Read, place: Place) -> torch.Tensor:
    if edit.kind == "whole":
        return _whole(edit, read, place).to(value.dtype)
    if edit.kind == "scale":
        return _scaled(value, edit, read(edit.tensors["value"]).to(value.dtype))
    if edit.kind == "rows":
        rows = read(edit.tensors["value"]).to(value.dtype)
        return value.index_copy(0, torch.tensor(edit.ids), rows)
    if edit.kind == "dora":
        summed = value + low_rank(edit, read)
        by_output = summed.T if edit.transposed else summed
        magnitude = read(edit.tensors["magnitude"]).to(value.dtype)
        factor: torch.Tensor = magnitude / torch.linalg.norm(by_output, dim=1)
        return summed * (factor.view(1, -1) if edit.transposed else factor.view(-1, 1))
    return value + added(edit, read, place=place, shape=value.shape)


def _whole(edit: Edit, read: Read, place: Place) -> torch.Tensor:
    """What stands in for the weight; of fused experts the part that the weight is."""
    value = read(edit.tensors["value"])
    if place.expert is None:
        return value
    size = value.shape[1 + place.axis] // place.num_parts
    return value[place.expert].narrow(place.axis, place.part * size, size)


def _scaled(value: torch.Tensor, edit: Edit, vector: torch.Tensor) -> torch.Tensor:
    if value.ndim == 1:
        return value * vector.reshape(-1)
    along_columns = edit.of_inputs != edit.transposed  # W is (d_out, d_in), or (d_in, d_out)
    return value * (vector.reshape(1, -1) if along_columns else vector.reshape(-1, 1))


def added(edit: Edit, read: Read, *, place: Place, shape: Sequence[int]) -> torch.Tensor:
    """What an edit adds to a weight of this shape, in fp32. `place` tells of which expert's part."""
    if edit.kind == "shift":
        return read(edit.tensors["value"]).float() * edit.scale
    if edit.kind == "experts":
        return _expert(edit, read, place, shape)
    if edit.kind == "vera":
        return _vera(edit, read, shape[::-1] if edit.transposed else shape)
    return low_rank(edit, read)


def _vera(edit: Edit, read: Read, shape: Sequence[int]) -> torch.Tensor:
    """b (B A d) of the first rows of the shared B and columns of the shared A; `shape` is (d_out, d_in)."""
    b, d = (read(edit.tensors[part]).float().unsqueeze(-1) for part in ("b", "d"))
    whole_a, whole_b = read(edit.tensors["A"]).float(), read(edit.tensors["B"]).float()
    product = (b * whole_b[: shape[0]]) @ (d * whole_a[:, : shape[1]])
    return product.T if edit.transposed else product


def low_rank(edit: Edit, read: Read) -> torch.Tensor:
    """s B A in fp32, the way round that the weight has it."""
    a, b, turned = _factors(edit, read)
    product = b @ a
    return (product.T if turned else product).mul_(edit.scale)


def _factors(edit: Edit, read: Read) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """A and B in fp32, and whether the weight is their product the other way round."""
    a, b = read(edit.tensors["A"]).float(), read(edit.tensors["B"]).float()
    if "E" in edit.tensors:
        a = a * read(edit.tensors["E"]).float()
    return a, b, edit.transposed or edit.kind == "embedding"


def _expert(edit: Edit, read: Read, place: Place, shape: Sequence[int]) -> torch.Tensor:
    """s B[e] A[e] of one expert's part, or of all experts (shape (num_experts, ., .)).

    PEFT stacks A (num_experts x rank, d_in) by expert, and B (d_out, rank x num_experts) by rank.
    """
    num = shape[0] if place.expert is None else place.num_experts
    a, b = read(edit.tensors["A"]).float(), read(edit.tensors["B"]).float()
    by_expert, by_rank = a.reshape(num, -1, a.shape[1]), b.reshape(b.shape[0], -1, num)

    def of(expert: int) -> torch.Tensor:
        found = (by_rank[:, :, expert] @ by_expert[expert]).mul_(edit.scale)
        return found.T if edit.transposed else found

    if place.expert is None:
        found = torch.empty(tuple(shape))
        for expert in range(num):
            found[expert] = of(expert)
        return found
    whole = of(place.expert)
    size = whole.shape[place.axis] // place.num_parts
    return whole.narrow(place.axis, place.part * size, size)
