"""The plan's base without its weights: on the meta device for shapes alone, elsewhere with random numbers."""

from __future__ import annotations

from typing import Any, cast

import torch

from peftkit.model.base.unknown_family import AUTO_CLASSES
from peftkit.model.load import chosen_attention, configured
from peftkit.model.quantize import after_loading, mended_loading, quantize_blank
from peftkit.plan.plan import BasePlan

_SPREAD = 0.02  # of random weights: what most models start with


def blank_model(base: BasePlan, config: Any, *, device: str) -> Any:
    """The model that loading would give, 4-bit layers included, from its configuration alone.

    Weights are made where they will lie, one at a time, so that no more than one is there before its
    quantization.
    """
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[cast(Any, base.task)])
    with mended_loading(base), torch.device("meta"):
        model = auto.from_config(
            configured(config, base),
            dtype=getattr(torch, base.dtype),
            trust_remote_code=base.trust_remote_code,
            **chosen_attention(base),
        )

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if device == "meta" or tensor.device.type != "meta":
            return tensor
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return torch.randn(tensor.shape, dtype=tensor.dtype, device=device).mul_(_SPREAD)

    quantize_blank(model, base, fill)
    if device != "meta":
        _fill_rest(model, fill)
        model.tie_weights()
        after_loading(model, base)
    return model


def _fill_rest(model: Any, fill: Any) -> None:
    """Numbers for whatever is still on the meta device; what is tied stays tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                if id(parameter) not in made:
                    made[id(parameter)] = torch.nn.Parameter(
                        fill(parameter), requires_grad=parameter.requires_grad
                    )
                module.register_parameter(key, made[id(parameter)])
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device.type == "meta":
                module.register_buffer(key, fill(buffer), persistent=False)
