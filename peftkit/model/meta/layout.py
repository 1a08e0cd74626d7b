"""Where each tensor of a base's files stands in the model: by the very rules that transformers loads it by.

Names in files and in models differ: prefixes come and go, experts lie apart on disk and fused in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Place:
    """A tensor's place: a parameter as a whole; or of its `expert` the part `part` of `num_parts`.

    Parts stand one after the other along the axis `axis` of the expert's matrix. `is_plain` is False where
    transformers computes more on loading than putting together.
    """

    parameter: str
    expert: int | None = None
    num_experts: int = 1
    part: int = 0
    num_parts: int = 1
    axis: int = 0
    is_plain: bool = True


def places(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """Name in the files -> place in `model`, which may be on the meta device. Others are not read at all."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed not in state:
            continue
        if pattern is None:
            found[name] = Place(renamed)
        else:
            num_experts = int(state[renamed].shape[0])
            found[name] = _place(Place(renamed, num_experts=num_experts), name, pattern, by_pattern[pattern])
    return found


def _place(place: Place, name: str, pattern: str, converter: Any) -> Place:
    """The place of a tensor that is put together with others."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = converter.operations
    parts = len(converter.source_patterns)
    kinds = tuple(type(step) for step in steps)
    stacked = kinds in {(MergeModulelist,), (MergeModulelist, Concatenate)} and steps[0].dim == 0
    expert = re.search(r"\.(\d+)\.", name[name.rfind("experts") :]) if stacked else None
    if expert is None or (len(steps) == 1) != (parts == 1):
        return replace(place, is_plain=False)
    axis = steps[1].dim - 1 if len(steps) == 2 else 0  # of one expert's matrix
    part = converter.source_patterns.index(pattern)
    return replace(place, expert=int(expert[1]), part=part, num_parts=parts, axis=axis)


def ties(model: Any) -> dict[str, tuple[str, ...]]:
    """Parameter -> all names of the tensor that it shares, its own among them, where there are several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    shared = (tuple(names) for names in groups.values() if len(names) > 1)
    return {name: names for names in shared for name in names}
