"""Rotary positions of a model: scaled by its configuration, or stretched for a while in a loaded one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rope_parameters(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' `rope_parameters` for a kind of RoPE scaling, keeping the base frequency.

    Families with two kinds of layers (Gemma 3) hold one set per kind; only the full-attention ones are
    scaled.
    """
    scaling_parameters = {"rope_type": scaling["kind"], "factor": float(scaling["factor"])}
    if scaling["kind"] == "yarn":
        scaling_parameters["original_max_position_embeddings"] = scaling["trained"]
    old_parameters = config.get("rope_parameters") or {}
    is_nested = all(isinstance(value, Mapping) for value in old_parameters.values()) and old_parameters
    if is_nested:
        new_parameters: Any = {
            kind: {**parameters, **scaling_parameters} if "full" in kind else dict(parameters)
            for kind, parameters in old_parameters.items()
        }
    else:
        base_parameters = {
            key: old_parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in old_parameters
        }
        new_parameters = {**base_parameters, **scaling_parameters}
    max_positions = (
        {} if scaling["kind"] == "dynamic" else {"max_position_embeddings": int(scaling["trained"] * scaling["factor"])}
    )
    return {"rope_parameters": new_parameters, **max_positions}


@contextmanager
def stretched_rope(model: PreTrainedModel, scaling: Mapping[str, Any]) -> Iterator[bool]:
    """Stretch the rotary positions of a loaded model inside this block; yield whether it has such modules.

    Its modules of rotary embeddings are replaced by new ones of the scaled configuration, as loading would make them.
    """
    config = copy.deepcopy(model.config)
    config.update(rope_parameters(config.to_dict(), scaling))
    replaced = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding") and hasattr(module, "inv_freq")
    ]
    for name, module in replaced:
        model.set_submodule(name, type(module)(config=config).to(module.inv_freq.device))
    try:
        yield bool(replaced)
    finally:
        for name, module in replaced:
            model.set_submodule(name, module)
