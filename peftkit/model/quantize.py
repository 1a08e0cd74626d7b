"""The 4-bit base: bitsandbytes' configuration, fused experts, and what must be mended around loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

from peftkit.model.mends import bnb_cpu_repack, falcon_linear
from peftkit.plan.plan import BasePlan
from peftkit.plan.targets import matches

if TYPE_CHECKING:
    import torch


def quantization_config(base: BasePlan) -> Any:
    """transformers' BitsAndBytesConfig for a plan, or None where the base is not quantized."""
    if base.quant_type is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quant_type,
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, base.compute_dtype),
        # the list replaces the library's own, which would leave the head in
        llm_int8_skip_modules=list(base.skip_4bit),
    )


@contextmanager
def mended_loading(base: BasePlan) -> Iterator[None]:
    """What has to hold while a model is loaded in 4-bit."""
    if base.quant_type is None:
        yield
        return
    with falcon_linear.mended():
        yield


def after_loading(model: Any, base: BasePlan) -> None:
    """Quantize fused experts and mend the layers. Call it again after anything that makes 4-bit layers."""
    if base.quant_type is None:
        return
    _quantize_experts(model, base)
    bnb_cpu_repack.mend(model)


def quantize_blank(model: Any, base: BasePlan, fill: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make the 4-bit layers of a model on the meta device, as loading its weights would.

    `fill` gives each weight its numbers and its device before it is quantized, one at a time.
    """
    if base.quant_type is None:
        return
    import torch
    from bitsandbytes.functional import quantize_blockwise
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from transformers.integrations import replace_with_bnb_linear

    # the library keeps its code table where it is first used, and one without numbers would stay for good
    quantize_blockwise(torch.zeros(1))
    replace_with_bnb_linear(
        model,
        modules_to_not_convert=list(base.skip_4bit),
        quantization_config=quantization_config(base),
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            size = (module.out_features, module.in_features)
            plain = fill(torch.empty(size, dtype=getattr(torch, base.dtype), device="meta"))
            module.weight = Params4bit(
                plain,
                requires_grad=False,
                quant_type=base.quant_type,
                compress_statistics=base.double_quant,
            )._quantize(plain.device)  # type: ignore[no-untyped-call]
            if module.bias is not None:
                module.bias = torch.nn.Parameter(module.bias.to(plain.dtype), requires_grad=False)
    _quantize_experts(model, base, fill)
    model.tie_weights()
    model.config.update({"_is_quantized": True})  # as loading does: some state layers look at it


def _quantize_experts(
    model: Any, base: BasePlan, fill: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> None:
    """Experts are 3-D parameters, which transformers leaves alone: most of a mixture stands in them."""
    import torch
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3 and any(matches(f"{name}.{key}", ending) for ending in base.experts_4bit):
                if fill is not None:
                    module.register_parameter(key, torch.nn.Parameter(fill(parameter), requires_grad=False))
                replace_parameter_4bit(
                    module,
                    key,
                    quant_type=cast(Literal["nf4", "fp4"], base.quant_type),
                    compress_statistics=base.double_quant,
                )


def coverage(model: Any) -> float:
    """The share of parameters that is held in 4-bit, counted on the loaded model."""
    from torch.nn.utils.parametrize import is_parametrized

    held = total = 0
    seen: set[int] = set()
    for module in model.modules():
        parametrized = is_parametrized(module)
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:  # tied
                continue
            seen.add(id(parameter))
            state = getattr(parameter, "quant_state", None)
            num = state.shape.numel() if state is not None else parameter.numel()
            held += num if state is not None else 0
            total += num
        if parametrized:
            for chain in module.parametrizations.values():
                num = chain[0].quant_state.shape.numel()
                held, total = (
                    held + num,
                    total + num - sum(p.numel() for p in chain.parameters(recurse=False)),
                )
    return held / total


def layers_in_4bit(model: Any, base: BasePlan) -> dict[str, bool]:
    """Parameters of a model on the meta device that loading would put into 4-bit (it is changed).

    The value says whether the layer holds its weight the other way round while it quantizes it (Conv1D).
    """
    if base.quant_type is None:
        return {}
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.integrations import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D

    experts = {
        f"{name}.{key}": False
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and any(matches(f"{name}.{key}", ending) for ending in base.experts_4bit)
    }
    with torch.device("meta"):
        replace_with_bnb_linear(
            model,
            modules_to_not_convert=list(base.skip_4bit),
            quantization_config=quantization_config(base),
        )
    layers = {
        f"{name}.weight": module.source_cls is Conv1D
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    return layers | experts


def through_4bit(weight: torch.Tensor, base: BasePlan, *, turned: bool, device: str = "cpu") -> torch.Tensor:
    """What a 4-bit layer computes with: the weight quantized and dequantized, in its own type.

    `turned` for layers that hold it the other way round.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    assert base.quant_type is not None
    plain = (weight.T if turned else weight).contiguous().to(device)
    packed, state = quantize_4bit(plain, compress_statistics=base.double_quant, quant_type=base.quant_type)
    found = dequantize_4bit(packed, state).to("cpu")
    return (found.T if turned else found).contiguous()


def packed_4bit(weight: torch.Tensor, base: BasePlan, *, turned: bool) -> dict[str, torch.Tensor]:
    """A weight in 4-bit as transformers stores it: "" holds the codes, other keys continue the name."""
    from bitsandbytes.functional import quantize_4bit

    assert base.quant_type is not None
    plain = (weight.T if turned else weight).contiguous()
    packed, state = quantize_4bit(plain, compress_statistics=base.double_quant, quant_type=base.quant_type)
    return {"": packed, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}
