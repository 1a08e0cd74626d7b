"""What a merge will write, decided before any weight is read: a frozen value from names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.edits import Edit, Edits
from peftkit.model.meta.layout import Place
from peftkit.model.meta.skeleton import Skeleton
from peftkit.ship.files.tensors import Entry


@dataclass(frozen=True)
class Output:
    """One tensor that is written. `source` is None where the adapter alone has it (a task's head).

    `is_4bit` where training held it in 4-bit, `turned` where the other way round; `in_4bit` where it is to go
    through 4-bit before the adapter is added.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: Place | None
    source: Entry | None
    edits: tuple[tuple[Edit, ...], ...]  # of each adapter
    is_4bit: bool = False
    in_4bit: bool = False
    turned: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MergePlan:
    """All that is written, file by file in the order of the base's, and the model's configuration."""

    outputs: tuple[Output, ...]
    config: Mapping[str, Any]
    untied: bool

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)

    def files(self) -> dict[str, list[Output]]:
        """File name -> its tensors."""
        found: dict[str, list[Output]] = {}
        for output in self.outputs:
            found.setdefault(output.file, []).append(output)
        return found


def plan_merge(
    base: Mapping[str, Entry],
    skeleton: Skeleton,
    adapters: Sequence[tuple[Edits, Mapping[str, Entry]]],
    *,
    dtype: torch.dtype | None = None,
    dequantized: bool = False,
) -> MergePlan:
    """What comes of a base's tensors and the edits of adapters, each with the tensors of its file.

    `dtype` is that of all floating numbers; None keeps each tensor's own. `dequantized` sends what training
    held in 4-bit through 4-bit first. Raises UserError for an edit that finds no weight.
    """
    edited = list(dict.fromkeys(parameter for edits, _ in adapters for parameter in edits))
    outputs = []
    for entry in base.values():
        place = skeleton.places.get(entry.name)
        outputs.append(_output(entry.name, entry, place, skeleton, adapters, (dtype, dequantized)))
    there = {output.place.parameter for output in outputs if output.place is not None}
    twins = _untied(skeleton, adapters, there)
    for parameter, twin in twins.items():
        source = next(o.source for o in outputs if o.place is not None and o.place.parameter == twin)
        place = Place(parameter)
        outputs.append(_output(parameter, source, place, skeleton, adapters, (dtype, dequantized)))
    held = {name for parameter in there for name in skeleton.ties.get(parameter, (parameter,))}
    alone = [p for p in edited if p not in held and p not in twins]
    last = outputs[-1]
    outputs += [_of_adapter(parameter, adapters, last, dtype) for parameter in alone]
    _check(outputs)
    config = dict(skeleton.config)
    if twins:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
    order = {name: i for i, name in enumerate(dict.fromkeys(output.file for output in outputs))}
    return MergePlan(tuple(sorted(outputs, key=lambda o: order[o.file])), config, bool(twins))


def _output(
    name: str,
    entry: Entry | None,
    place: Place | None,
    skeleton: Skeleton,
    adapters: Sequence[tuple[Edits, Mapping[str, Entry]]],
    how: tuple[torch.dtype | None, bool],
) -> Output:
    """A tensor of the base's files, edited or not."""
    assert entry is not None
    dtype, dequantized = how
    parameter = place.parameter if place is not None else ""
    edits = tuple(edits.get(parameter, ()) for edits, _ in adapters)
    shape = entry.shape
    for own, (_, tensors) in zip(edits, adapters, strict=True):
        if own and own[0].kind == "whole" and (place is None or place.expert is None):
            shape = tensors[own[0].tensors["value"]].shape  # a resized vocabulary
    floats = entry.dtype.is_floating_point
    return Output(
        name,
        entry.file.name,
        dtype if dtype is not None and floats else entry.dtype,
        shape,
        place,
        entry,
        edits,
        is_4bit=parameter in skeleton.in_4bit,
        in_4bit=dequantized and parameter in skeleton.in_4bit,
        turned=skeleton.in_4bit.get(parameter, False),
    )


def _untied(
    skeleton: Skeleton, adapters: Sequence[tuple[Edits, Mapping[str, Entry]]], there: set[str]
) -> dict[str, str]:
    """Parameters that share a tensor with one in the files and do not any more -> that one.

    PEFT changes one end of a tied pair and leaves the other as it was, unless it was told to keep the tie.
    """
    groups = {
        names: next(name for name in names if name in there)
        for names in dict.fromkeys(skeleton.ties.values())
        if there & set(names)
    }
    apart = [
        names
        for names, held in groups.items()
        if any(
            not _same(edits.get(held, ()), edits.get(name, ()), files)
            for name in set(names) - there
            for edits, files in adapters
        )
    ]
    if strange := [names for names in apart if not skeleton.tables & set(names)]:
        got = f"an adapter of {strange[0][0]}, which the model uses at several places at once"
        raise UserError(Problem("merge", got, "layers that are used once", "use it with PEFT as it is"))
    # the configuration unties all tables or none: then each needs a tensor of its own
    return {
        name: held
        for names, held in groups.items()
        if apart and skeleton.tables & set(names)
        for name in names
        if name not in there
    }


def _same(one: tuple[Edit, ...], other: tuple[Edit, ...], tensors: Mapping[str, Entry]) -> bool:
    """Whether two edits of one weight do the same."""
    if len(one) != len(other):
        return False
    return all(_alike(a, b, tensors) for a, b in zip(one, other, strict=True))


def _alike(one: Edit, other: Edit, tensors: Mapping[str, Entry]) -> bool:
    if {one.kind, other.kind} == {"embedding", "lora"}:  # W^T + s B A against W + s (B A)^T
        lora, table = (one, other) if one.kind == "lora" else (other, one)
        pairs = [("A", "B"), ("B", "A")]
        same = [_equal(tensors[lora.tensors[a]], tensors[table.tensors[b]], turned=True) for a, b in pairs]
        return one.scale == other.scale and all(same)
    if replace(one, tensors={}) != replace(other, tensors={}):
        return False
    return one.tensors.keys() == other.tensors.keys() and all(
        one.tensors[part] == other.tensors[part]
        or _equal(tensors[one.tensors[part]], tensors[other.tensors[part]])
        for part in one.tensors
    )


def _equal(one: Entry, other: Entry, *, turned: bool = False) -> bool:
    return torch.equal(one.read(), other.read().T if turned else other.read())


def _of_adapter(
    parameter: str,
    adapters: Sequence[tuple[Edits, Mapping[str, Entry]]],
    beside: Output,
    dtype: torch.dtype | None,
) -> Output:
    """A tensor that the base does not bring: the head that was trained for a task."""
    edits = tuple(edits.get(parameter, ()) for edits, _ in adapters)
    first = next(((own[0], tensors) for own, (_, tensors) in zip(edits, adapters, strict=True) if own), None)
    assert first is not None
    if first[0].kind != "whole" or not all(edits):
        got = f"an adapter of {parameter}, which the base's files do not hold"
        raise UserError(Problem("merge", got, "a weight in the base for each that is adapted"))
    entry = first[1][first[0].tensors["value"]]
    held = dtype or beside.dtype
    return Output(parameter, beside.file, held, entry.shape, Place(parameter), None, edits)


def _check(outputs: Sequence[Output]) -> None:
    """Raises UserError, all at once, for what would be merged into the wrong thing."""
    problems = list(_problems(outputs))
    if problems:
        raise UserError(problems[:5])


def _problems(outputs: Sequence[Output]) -> Iterator[Problem]:
    for output in outputs:
        if not any(output.edits) and not output.in_4bit:
            continue
        assert output.place is not None
        if not output.place.is_plain:
            got = f"{output.name}, which transformers computes with while it loads it"
            fix = "save the base with transformers' save_pretrained, and merge into that"
            yield Problem("merge", got, "weights that stand in the files as they are", fix)
        if output.source is not None and not output.dtype.is_floating_point:
            got = f"{output.name} of {output.dtype}"
            yield Problem("merge", got, "a base in 16 or 32 bits", "merge into the unquantized model")
