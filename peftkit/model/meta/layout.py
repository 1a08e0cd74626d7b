"""The parameter behind each tensor of a base's files, by the rules that transformers loads them with.

Names in files and in models differ: prefixes come and go, experts are separate on disk and fused in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Placement:
    """The target of a file's tensor: a whole parameter, or part `part` of `num_parts` of its `expert`.

    Parts are concatenated along `axis` of the expert's matrix. `is_plain` is False where transformers does
    more than stack and concatenate on loading.
    """

    parameter: str
    expert: int | None = None
    num_experts: int = 1
    part: int = 0
    num_parts: int = 1
    axis: int = 0
    is_plain: bool = True


def place_tensors(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Placement]:
    """Map tensor names in the files to their place in `model`, which may be on the meta device.

    Tensors that transformers does not read are left out.
    {"...experts.3.up_proj.weight": Placement("...experts.gate_up_proj", expert=3, num_experts=8, part=1,
     num_parts=2)}
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    placements = {}
    for name in names:
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if parameter not in state and name in state:
            parameter, pattern = rename_source_key(name, [], [], prefix, state)
        if parameter not in state:
            continue
        if pattern is None:
            placements[name] = Placement(parameter)
        else:
            num_experts = int(state[parameter].shape[0])
            # a tensor that transformers fuses with others
            placement = Placement(parameter, num_experts=num_experts)
            converter = by_pattern[pattern]
            operations = converter.operations
            num_parts = len(converter.source_patterns)
            operation_types = tuple(type(operation) for operation in operations)
            is_stacked = (
                operation_types in {(MergeModulelist,), (MergeModulelist, Concatenate)} and operations[0].dim == 0
            )
            expert_match = re.search(r"\.(\d+)\.", name[name.rfind("experts") :]) if is_stacked else None
            if expert_match is None or (len(operations) == 1) != (num_parts == 1):
                placements[name] = replace(placement, is_plain=False)
            else:
                axis = operations[1].dim - 1 if len(operations) == 2 else 0  # of one expert's matrix
                part = converter.source_patterns.index(pattern)
                placements[name] = replace(
                    placement, expert=int(expert_match[1]), part=part, num_parts=num_parts, axis=axis
                )
    return placements


def tied_parameters(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return, for each tied parameter, all names of its tensor, its own among them."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    shared = (tuple(names) for names in groups.values() if len(names) > 1)
    return {name: names for names in shared for name in names}
