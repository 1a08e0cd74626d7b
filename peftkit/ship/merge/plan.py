"""Merge plan: every tensor to write, decided from names and shapes before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.edits import Edit, Edits
from peftkit.model.meta.layout import Placement
from peftkit.model.meta.skeleton import BaseLayout
from peftkit.ship.files.tensors import TensorEntry


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write. `source` is None where only the adapter has it (a task's head).

    `is_4bit`: training held it in 4-bit; `is_transposed_4bit`: quantized in transposed layout;
    `in_4bit`: goes through 4-bit before the adapter is added.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: Placement | None
    source: TensorEntry | None
    edits: tuple[tuple[Edit, ...], ...]  # of each adapter
    is_4bit: bool = False
    in_4bit: bool = False
    is_transposed_4bit: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MergePlan:
    """Plan of a merge: all tensors to write, file by file in the base's order, and the configuration."""

    outputs: tuple[OutputTensor, ...]
    config: Mapping[str, Any]
    untied: bool

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)

    def files(self) -> dict[str, list[OutputTensor]]:
        """Return file name -> its tensors."""
        by_file: dict[str, list[OutputTensor]] = {}
        for output in self.outputs:
            by_file.setdefault(output.file, []).append(output)
        return by_file


def plan_merge(
    base: Mapping[str, TensorEntry],
    skeleton: BaseLayout,
    adapters: Sequence[tuple[Edits, Mapping[str, TensorEntry]]],
    *,
    dtype: torch.dtype | None = None,
    dequantized: bool = False,
) -> MergePlan:
    """Plan the tensors of a merge from a base's tensors and each adapter's edits and tensors.

    `dtype` is that of all floating-point tensors; None keeps each tensor's own. `dequantized` sends what
    training held in 4-bit through 4-bit first. Raises UserError for an edit that finds no weight.
    """
    edited_parameters = list(dict.fromkeys(parameter for edits, _ in adapters for parameter in edits))
    outputs = []
    for entry in base.values():
        place = skeleton.placements.get(entry.name)
        outputs.append(_plan_output(entry.name, entry, place, skeleton, adapters, (dtype, dequantized)))
    present = {output.place.parameter for output in outputs if output.place is not None}
    untied = _untied_parameters(skeleton, adapters, present)
    for parameter, stored_parameter in untied.items():
        source = next(o.source for o in outputs if o.place is not None and o.place.parameter == stored_parameter)
        place = Placement(parameter)
        outputs.append(_plan_output(parameter, source, place, skeleton, adapters, (dtype, dequantized)))
    covered = {name for parameter in present for name in skeleton.ties.get(parameter, (parameter,))}
    adapter_only = [p for p in edited_parameters if p not in covered and p not in untied]
    last_output = outputs[-1]
    outputs += [_head_output(parameter, adapters, last_output, dtype) for parameter in adapter_only]
    problems = list(_output_problems(outputs))
    if problems:
        raise UserError(problems[:5])
    config = dict(skeleton.config)
    if untied:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
    order = {name: i for i, name in enumerate(dict.fromkeys(output.file for output in outputs))}
    return MergePlan(tuple(sorted(outputs, key=lambda o: order[o.file])), config, bool(untied))


def _plan_output(
    name: str,
    entry: TensorEntry | None,
    place: Placement | None,
    skeleton: BaseLayout,
    adapters: Sequence[tuple[Edits, Mapping[str, TensorEntry]]],
    how: tuple[torch.dtype | None, bool],
) -> OutputTensor:
    """Return the output of a tensor of the base's files, edited or not."""
    assert entry is not None
    dtype, dequantized = how
    parameter = place.parameter if place is not None else ""
    edits = tuple(edits.get(parameter, ()) for edits, _ in adapters)
    shape = entry.shape
    for weight_edits, (_, tensors) in zip(edits, adapters, strict=True):
        if weight_edits and weight_edits[0].kind == "whole" and (place is None or place.expert is None):
            shape = tensors[weight_edits[0].tensors["value"]].shape  # a resized vocabulary
    is_floating = entry.dtype.is_floating_point
    return OutputTensor(
        name,
        entry.file.name,
        dtype if dtype is not None and is_floating else entry.dtype,
        shape,
        place,
        entry,
        edits,
        is_4bit=parameter in skeleton.in_4bit,
        in_4bit=dequantized and parameter in skeleton.in_4bit,
        is_transposed_4bit=skeleton.in_4bit.get(parameter, False),
    )


def _untied_parameters(
    skeleton: BaseLayout, adapters: Sequence[tuple[Edits, Mapping[str, TensorEntry]]], present: set[str]
) -> dict[str, str]:
    """Return the parameters that need a tensor of their own -> the stored parameter that they were tied to.

    PEFT changes one end of a tied pair and leaves the other as it was, unless told to keep the tie. A group
    is split where an adapter's edits of its ends differ. The configuration unties all tables or none, so one
    split table unties them all.

    files {"embed"}, ties embed = head
    edits {"embed": lora}                         -> {"head": "embed"}: head keeps the unedited embed
    edits {"embed": lora, "head": the same lora}  -> {}: still tied

    Raises UserError for a split group that is no table, such as a layer used at several places.
    """
    groups = {
        names: next(name for name in names if name in present)
        for names in dict.fromkeys(skeleton.ties.values())
        if present & set(names)
    }
    split_groups = [
        names
        for names, stored_name in groups.items()
        if any(
            not _same_edits(edits.get(stored_name, ()), edits.get(name, ()), file_tensors)
            for name in set(names) - present
            for edits, file_tensors in adapters
        )
    ]
    if unsupported := [names for names in split_groups if not skeleton.tables & set(names)]:
        got = f"an adapter of {unsupported[0][0]}, which the model uses at several places"
        raise UserError(
            Problem("merge", got, "layers that are used once", "load the adapter with PEFT instead of merging")
        )
    # the configuration unties all tables or none: then each needs a tensor of its own
    return {
        name: stored_name
        for names, stored_name in groups.items()
        if split_groups and skeleton.tables & set(names)
        for name in names
        if name not in present
    }


def _same_edits(
    first_edits: tuple[Edit, ...], second_edits: tuple[Edit, ...], tensors: Mapping[str, TensorEntry]
) -> bool:
    """Return whether two lists of edits of one weight compute the same."""
    if len(first_edits) != len(second_edits):
        return False
    return all(_is_same_edit(a, b, tensors) for a, b in zip(first_edits, second_edits, strict=True))


def _is_same_edit(first: Edit, second: Edit, tensors: Mapping[str, TensorEntry]) -> bool:
    """Return whether two edits compute the same.

    An embedding's W^T + s B A equals a layer's W + s (B A)^T where A and B are swapped and transposed.
    """
    if {first.kind, second.kind} == {"embedding", "lora"}:  # W^T + s B A against W + s (B A)^T
        lora, table = (first, second) if first.kind == "lora" else (second, first)
        pairs = [("A", "B"), ("B", "A")]
        equal_pairs = [
            _equal_tensors(tensors[lora.tensors[a]], tensors[table.tensors[b]], transposed=True) for a, b in pairs
        ]
        return first.scale == second.scale and all(equal_pairs)
    if replace(first, tensors={}) != replace(second, tensors={}):
        return False
    return first.tensors.keys() == second.tensors.keys() and all(
        first.tensors[part] == second.tensors[part]
        or _equal_tensors(tensors[first.tensors[part]], tensors[second.tensors[part]])
        for part in first.tensors
    )


def _equal_tensors(first: TensorEntry, second: TensorEntry, *, transposed: bool = False) -> bool:
    return torch.equal(first.read(), second.read().T if transposed else second.read())


def _head_output(
    parameter: str,
    adapters: Sequence[tuple[Edits, Mapping[str, TensorEntry]]],
    last_output: OutputTensor,
    dtype: torch.dtype | None,
) -> OutputTensor:
    """Return the output of a parameter that only the adapter has: the trained head of a task.

    Raises UserError for any other edit of a parameter that the base's files lack.
    """
    edits = tuple(edits.get(parameter, ()) for edits, _ in adapters)
    head_edit = next(
        (
            (weight_edits[0], tensors)
            for weight_edits, (_, tensors) in zip(edits, adapters, strict=True)
            if weight_edits
        ),
        None,
    )
    assert head_edit is not None
    if head_edit[0].kind != "whole" or not all(edits):
        got = f"an adapter of {parameter}, which is not in the base's files"
        raise UserError(Problem("merge", got, "a base weight for every adapted parameter"))
    entry = head_edit[1][head_edit[0].tensors["value"]]
    output_dtype = dtype or last_output.dtype
    return OutputTensor(parameter, last_output.file, output_dtype, entry.shape, Placement(parameter), None, edits)


def _output_problems(outputs: Sequence[OutputTensor]) -> Iterator[Problem]:
    for output in outputs:
        if not any(output.edits) and not output.in_4bit:
            continue
        assert output.place is not None
        if not output.place.is_plain:
            got = f"{output.name}, which transformers converts while loading"
            fix = "save the base with transformers' save_pretrained, and merge into that"
            yield Problem("merge", got, "weights stored as the model uses them", fix)
        if output.source is not None and not output.dtype.is_floating_point:
            got = f"{output.name} of {output.dtype}"
            yield Problem("merge", got, "a base in 16 or 32 bits", "merge into the unquantized model")
