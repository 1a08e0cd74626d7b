"""The plan's base built from its configuration: shapes on the meta device, random weights on any other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from peftkit.model.base.unknown_family import AUTO_CLASSES
from peftkit.model.load import apply_overrides, attention_argument
from peftkit.model.quantize import finish_4bit_loading, make_4bit_layers, patched_loading
from peftkit.plan.plan import BasePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RANDOM_STD = 0.02  # of random weights: what most models start with


def model_from_config(base: BasePlan, config: object, *, device: str) -> PreTrainedModel:
    """Build the model that loading would return, 4-bit layers included, from its configuration alone.

    On the meta device it has shapes only; elsewhere weights are random with standard deviation 0.02, made on
    `device` one at a time, so that at most one unquantized weight exists at once.
    """
    import transformers

    auto_class = getattr(transformers, AUTO_CLASSES[cast(Any, base.task)])
    with patched_loading(base), torch.device("meta"):
        model = auto_class.from_config(
            apply_overrides(config, base),
            dtype=getattr(torch, base.dtype),
            trust_remote_code=base.trust_remote_code,
            **attention_argument(base),
        )

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        """Return random or zero values for a tensor on the meta device, other tensors as they are."""
        if device == "meta" or tensor.device.type != "meta":
            return tensor
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return torch.randn(tensor.shape, dtype=tensor.dtype, device=device).mul_(_RANDOM_STD)

    make_4bit_layers(model, base, fill)
    if device != "meta":
        filled: dict[int, torch.nn.Parameter] = {}
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter.device.type == "meta":
                    if id(parameter) not in filled:
                        filled[id(parameter)] = torch.nn.Parameter(
                            fill(parameter), requires_grad=parameter.requires_grad
                        )
                    module.register_parameter(key, filled[id(parameter)])
            for key, buffer in list(module.named_buffers(recurse=False)):
                if buffer.device.type == "meta":
                    module.register_buffer(key, fill(buffer), persistent=False)
        model.tie_weights()
        finish_4bit_loading(model, base)
    return model
