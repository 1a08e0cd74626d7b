"""The 4-bit base: bitsandbytes' configuration, fused experts, and fixes for library faults around loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, cast

from peftkit.model.mends import bnb_cpu_repack, falcon_linear
from peftkit.plan.plan import BasePlan
from peftkit.plan.targets import matches_target

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel


def build_quantization_config(base: BasePlan) -> BitsAndBytesConfig | None:
    """Build transformers' BitsAndBytesConfig for a plan; None where the base is not quantized."""
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
def patched_loading(base: BasePlan) -> Iterator[None]:
    """Apply the library patches that 4-bit loading needs, inside this block."""
    if base.quant_type is None:
        yield
        return
    with falcon_linear.plain_falcon_linear():
        yield


def finish_4bit_loading(model: PreTrainedModel, base: BasePlan) -> None:
    """Quantize fused experts and patch 4-bit layers. Call it again after anything that makes 4-bit layers."""
    if base.quant_type is None:
        return
    _quantize_experts(model, base)
    bnb_cpu_repack.clear_repack_flag(model)


def make_4bit_layers(model: PreTrainedModel, base: BasePlan, fill: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace linear layers and experts of a meta-device model by 4-bit ones, as loading would.

    `fill` gives each weight its values and device before it is quantized, one at a time.
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
        model, modules_to_not_convert=list(base.skip_4bit), quantization_config=build_quantization_config(base)
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            size = (module.out_features, module.in_features)
            weight = fill(torch.empty(size, dtype=getattr(torch, base.dtype), device="meta"))
            module.weight = Params4bit(
                weight, requires_grad=False, quant_type=base.quant_type, compress_statistics=base.double_quant
            )._quantize(weight.device)  # type: ignore[no-untyped-call]
            if module.bias is not None:
                module.bias = torch.nn.Parameter(module.bias.to(weight.dtype), requires_grad=False)
    _quantize_experts(model, base, fill)
    model.tie_weights()
    model.config.update({"_is_quantized": True})  # as loading does: some state layers look at it


def _quantize_experts(
    model: PreTrainedModel, base: BasePlan, fill: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> None:
    """Quantize fused experts: 3-D parameters, most of a mixture's weights, which transformers skips."""
    import torch
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3 and any(matches_target(f"{name}.{key}", ending) for ending in base.experts_4bit):
                if fill is not None:
                    module.register_parameter(key, torch.nn.Parameter(fill(parameter), requires_grad=False))
                replace_parameter_4bit(
                    module,
                    key,
                    quant_type=cast(Literal["nf4", "fp4"], base.quant_type),
                    compress_statistics=base.double_quant,
                )


def share_in_4bit(model: PreTrainedModel) -> float:
    """Return the share of parameters stored in 4-bit, counted on the loaded model."""
    from torch.nn.utils.parametrize import is_parametrized

    num_4bit = total = 0
    counted_ids: set[int] = set()
    for module in model.modules():
        parametrized = is_parametrized(module)
        for parameter in module.parameters(recurse=False):
            if id(parameter) in counted_ids:  # tied
                continue
            counted_ids.add(id(parameter))
            state = getattr(parameter, "quant_state", None)
            count = state.shape.numel() if state is not None else parameter.numel()
            num_4bit += count if state is not None else 0
            total += count
        if parametrized:
            for chain in module.parametrizations.values():
                count = chain[0].quant_state.shape.numel()
                num_4bit, total = (
                    num_4bit + count,
                    total
                    + count
                    - sum(packed_parameter.numel() for packed_parameter in chain.parameters(recurse=False)),
                )
    return num_4bit / total


def find_4bit_layers(model: PreTrainedModel, base: BasePlan) -> dict[str, bool]:
    """Return the parameters that loading would quantize to 4-bit; changes `model`, on the meta device.

    The value is True where the layer quantizes its weight transposed (Conv1D).
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
        if parameter.ndim == 3 and any(matches_target(f"{name}.{key}", ending) for ending in base.experts_4bit)
    }
    with torch.device("meta"):
        replace_with_bnb_linear(
            model, modules_to_not_convert=list(base.skip_4bit), quantization_config=build_quantization_config(base)
        )
    layers = {
        f"{name}.weight": module.source_cls is Conv1D
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    return layers | experts


def round_trip_4bit(weight: torch.Tensor, base: BasePlan, *, transposed: bool, device: str = "cpu") -> torch.Tensor:
    """Quantize and dequantize a weight: the values that a 4-bit layer computes with, in the weight's dtype.

    `transposed` for layers that quantize the transposed weight.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    assert base.quant_type is not None
    oriented = (weight.T if transposed else weight).contiguous().to(device)
    codes, state = quantize_4bit(oriented, compress_statistics=base.double_quant, quant_type=base.quant_type)
    dequantized = dequantize_4bit(codes, state).to("cpu")
    return (dequantized.T if transposed else dequantized).contiguous()


def pack_4bit(weight: torch.Tensor, base: BasePlan, *, transposed: bool) -> dict[str, torch.Tensor]:
    """Quantize a weight to the tensors that transformers stores.

    "" holds the codes; other keys extend the name.
    """
    from bitsandbytes.functional import quantize_4bit

    assert base.quant_type is not None
    oriented = (weight.T if transposed else weight).contiguous()
    codes, state = quantize_4bit(oriented, compress_statistics=base.double_quant, quant_type=base.quant_type)
    return {"": codes, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}


def weight_norm(weight: torch.Tensor) -> float:
    """Return the Frobenius norm of a layer's weight, of the values that it computes with where it is held in 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    return float(weight.detach().float().norm())
