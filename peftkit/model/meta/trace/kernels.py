"""Operations of the target device in place of the meta device's: the same shapes and lifetimes.

A function mode intercepts torch's Python functions and calls the operation that the target's kernel selection
would take. Sources: PyTorch's documentation of scaled_dot_product_attention (which kernel, when) and of
autocast (which operations, in which type).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from peftkit.model.meta.trace.head import fused_log_probs

KernelTarget = Literal["cuda", "cpu"]

_AUTOCAST_MATMULS = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.mm}
_AUTOCAST_MATMULS |= {torch.baddbmm, torch.addmm, F.conv1d, F.conv2d, F.prelu, torch.Tensor.bmm, torch.Tensor.mm}
_AUTOCAST_MATMULS |= {torch.Tensor.__rmatmul__, torch.Tensor.baddbmm, torch.Tensor.addmm}
# Operations that autocast runs in fp32: many on CUDA, losses and the like on CPU.
_AUTOCAST_FP32: Mapping[KernelTarget, set[Any]] = {
    "cuda": {
        F.softmax,
        F.log_softmax,
        F.layer_norm,
        F.cross_entropy,
        F.nll_loss,
        F.softplus,
        torch.softmax,
        torch.log_softmax,
        torch.pow,
        torch.rsqrt,
        torch.exp,
        torch.log,
        torch.cumsum,
        torch.sum,
        torch.prod,
        torch.Tensor.softmax,
        torch.Tensor.pow,
        torch.Tensor.__pow__,
        torch.Tensor.rsqrt,
        torch.Tensor.exp,
        torch.Tensor.log,
        torch.Tensor.cumsum,
        torch.Tensor.sum,
        torch.Tensor.prod,
        torch.Tensor.norm,
    },
    "cpu": {F.mse_loss, torch.prod, torch.Tensor.prod},
}


@dataclass(frozen=True)
class LMHead:
    """The LM head that the trainer computes in tiles: its weight, and what the tiles depend on."""

    weight: torch.Tensor
    softcap: bool
    num_learnt: int
    triton: bool


class TargetKernels(TorchFunctionMode):
    """Function mode with the kernels of `target`.

    `autocast` is the dtype of matrix products (None: off), `head` the fused LM head.
    """

    def __init__(self, target: KernelTarget, autocast: torch.dtype | None, *, head: LMHead | None) -> None:
        super().__init__()
        self.target, self.autocast, self.head = target, autocast, head
        # casts by the weight's id; the weight is held too, so that the id stays its own
        self._casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __exit__(self, *error: object) -> None:
        self._casts.clear()  # as leaving an autocast region does
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return self._run_attention(*args, **options)
        if getattr(func, "__name__", "") == "_grouped_mm":
            return GroupedProduct.apply(args[0], args[1])  # type: ignore[no-untyped-call]  # the meta device takes bf16 alone
        if func is F.linear and self.head is not None and args[1] is self.head.weight:
            return self._run_head(*args, **options)
        if self.target == "cuda":
            if func is F.dropout:
                return self._run_dropout(*args, **options)
            if func is F.softmax and (args[0].dtype != torch.float32 and options.get("dtype") == torch.float32):
                dim = options.get("dim", args[1] if len(args) > 1 else -1)
                return torch.ops.aten._softmax(args[0], dim, True)
        if self.autocast is not None:
            if func in _AUTOCAST_MATMULS:
                args = tuple(self._cast(value) for value in args)
                options = {key: self._cast(value) for key, value in options.items()}
            elif func in _AUTOCAST_FP32[self.target]:
                args = tuple(
                    (
                        value.float()
                        if (isinstance(value, torch.Tensor) and value.dtype in {torch.bfloat16, torch.float16})
                        else value
                    )
                    for value in args
                )
        return func(*args, **options)

    def _cast(self, value: object) -> Any:
        """Cast an fp32 tensor to the autocast dtype; a trainable weight is cast once per region."""
        assert self.autocast is not None
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.autocast)
        if id(value) not in self._casts:
            self._casts[id(value)] = value, value.to(self.autocast)
        return self._casts[id(value)][1]

    def _run_head(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the fused head's log-probabilities in place of logits."""
        assert self.head is not None
        return fused_log_probs(
            hidden,
            weight,
            bias,
            dtype=self.autocast or hidden.dtype,
            triton=self.head.triton,
            softcap=self.head.softcap,
            num_loss_tokens=self.head.num_learnt,
        )

    def _run_dropout(
        self, value: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        """Call CUDA's dropout, which saves a mask."""
        return torch.native_dropout(value, p, True)[0] if training and p > 0 else value

    def _run_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Call the scaled dot-product attention kernel that the target selects: flash, efficient or math."""
        if self.autocast is not None:
            query, key, value = (tensor.to(self.autocast) for tensor in (query, key, value))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(self.autocast)
        same_head_size = query.shape[-1] == value.shape[-1]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, 0.0)
        mask_has_grad = attn_mask is not None and attn_mask.requires_grad
        if self.target == "cpu":
            if dropout_p or not same_head_size or mask_has_grad:
                # call PyTorch's math attention, used where no fused kernel applies
                if enable_gqa:
                    key, value = (
                        tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value)
                    )
                return torch.ops.aten._scaled_dot_product_attention_math(
                    query, key, value, attn_mask, dropout_p, is_causal
                )[0]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        is_half = query.dtype in {torch.bfloat16, torch.float16}
        if attn_mask is None and is_half and same_head_size and query.shape[-1] <= 256:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if enable_gqa:
            key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]


class GroupedProduct(torch.autograd.Function):
    """Autograd function (tokens, in) x (experts, in, out) -> (tokens, out) in any dtype, by shapes only."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        needs_tokens_grad, needs_experts_grad = ctx.needs_input_grad
        ctx.sizes = tokens.shape, experts.shape
        ctx.save_for_backward(tokens if needs_experts_grad else None, experts if needs_tokens_grad else None)
        return tokens.new_empty(tokens.shape[0], experts.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        needs_tokens_grad, needs_experts_grad = ctx.needs_input_grad
        tokens_shape, experts_shape = ctx.sizes
        return (
            gradient.new_empty(tokens_shape) if needs_tokens_grad else None,
            gradient.new_empty(experts_shape) if needs_experts_grad else None,
        )


# Bytes that a kernel takes and gives back while it runs, by operation: (arguments of the operation) -> sizes.
def _dequantized_sizes(a: Any, b: Any, shape: Any, *rest: Any, **options: Any) -> list[int]:
    """Return the scratch bytes of bitsandbytes' 4-bit product: dequantized weight and scales."""
    num_weights = shape[0] * shape[1]
    return [num_weights * a.element_size(), num_weights // 64 * 4]


SCRATCH: Mapping[KernelTarget, dict[str, Callable[..., list[int]]]] = {
    "cuda": {"bitsandbytes::gemm_4bit": _dequantized_sizes},
    "cpu": {"bitsandbytes::gemm_4bit": _dequantized_sizes},
}
