"""Iteration over the tensors of a model's weights, and their size in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.parametrize import is_parametrized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weight_tensors(model: PreTrainedModel) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield (tensor, is trainable) of all parameters, with the scales of 4-bit ones; no buffers."""
    for parameter in model.parameters():
        yield parameter.data, parameter.requires_grad
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from ((tensor, False) for tensor in _quantization_scales(state))
    for module in model.modules():
        if is_parametrized(module):
            for chain in module.parametrizations.values():
                state = getattr(chain[0], "quant_state", None)
                if state is not None:
                    yield from ((tensor, False) for tensor in _quantization_scales(state))


def _quantization_scales(state: Any) -> Iterator[torch.Tensor]:
    yield state.absmax
    yield state.code
    if state.nested:
        yield state.offset
        yield state.state2.absmax
        yield state.state2.code


def count_tensor_bytes(model: PreTrainedModel) -> int:
    """Count the bytes of all weights and buffers, each storage once."""
    tensors = [*(tensor for tensor, _ in weight_tensors(model)), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_bytes(optimizer: Any) -> int:
    """Count the bytes of an optimizer's states; `optimizer` may be accelerate's wrapper of it."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return sum(t.untyped_storage().nbytes() for state in states for t in state.values() if torch.is_tensor(t))
