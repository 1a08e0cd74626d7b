"""Shape-only version of TRL's fused LM head: log-probabilities in tiles, never all logits at once.

TRL's own asks the device for its autocast state, which the meta device cannot answer. This one allocates the
same saved tensors, tiles and temporaries. Source: the documentation and the source of
`trl.trainer.utils.add_fused_lm_head` and `trl.kernels.ChunkedLogProbFunction` (TRL 1.16).
"""

from __future__ import annotations

from typing import Any

import torch

from peftkit.plan.memory import TILE_BYTES, TILE_TOKENS, TILE_VOCAB


def _empty_fp32(*size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


class FusedLogProbs(torch.autograd.Function):
    """Autograd function (N, hidden) x (vocab, hidden) -> (N,) log-probabilities, by shapes only.

    `scratch` is what torch needs per element of a tile beside it, in bytes, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        scratch: tuple[int, int],
    ) -> torch.Tensor:
        num_tokens, vocab = hidden.shape[0], weight.shape[0]
        targets = torch.empty(num_tokens, dtype=torch.long, device=hidden.device)
        statistics = [_empty_fp32(num_tokens, like=hidden) for _ in range(7)]
        _allocate_tile(hidden, weight, dtype, scratch[0])
        log_z, entropy, log_probs = (_empty_fp32(num_tokens, like=hidden) for _ in range(3))
        del statistics
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.dtype, ctx.scratch, ctx.vocab = dtype, scratch[1], vocab
        return log_probs

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        hidden, weight, bias, *_rest = ctx.saved_tensors
        needs_hidden_grad, needs_weight_grad, needs_bias_grad = ctx.needs_input_grad[:3]
        hidden_grad = _empty_fp32(*hidden.shape, like=hidden) if needs_hidden_grad else None
        weight_grad = _empty_fp32(*weight.shape, like=weight) if needs_weight_grad else None
        bias_grad = _empty_fp32(*bias.shape, like=bias) if needs_bias_grad else None
        _allocate_tile(hidden, weight, ctx.dtype, ctx.scratch, in_fp32=ctx.scratch > 0)
        return (
            None if hidden_grad is None else hidden_grad.to(hidden.dtype),
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(bias.dtype),
            None,
            None,
        )


def _allocate_tile(
    hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, scratch: int, *, in_fp32: bool = False
) -> None:
    """Allocate and free the tensors of one tile, alive at the same time."""
    num_tokens, num_columns = min(hidden.shape[0], TILE_TOKENS), min(weight.shape[0], TILE_VOCAB)
    buffer = torch.empty(num_tokens, TILE_VOCAB, dtype=dtype, device=hidden.device)
    hidden_tile, weight_tile = hidden[:num_tokens].to(dtype), weight[:num_columns].to(dtype)
    workspace = torch.empty(num_tokens, num_columns, scratch, dtype=torch.uint8, device=hidden.device)
    del workspace
    if in_fp32:
        # without a product that adds up in fp32 the tile and its factors are copied
        copies = [buffer[:, :num_columns].float(), weight_tile.float(), hidden_tile.float()]
        del copies
    del buffer, hidden_tile, weight_tile


def fused_log_probs(
    hidden_btd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    triton: bool,
    softcap: bool,
    num_loss_tokens: int,
) -> torch.Tensor:
    """Return log-probabilities of shape (N, 1), N the predicted positions.

    With Triton only those in the loss are computed. `hidden_btd` has shape (batch, tokens, hidden); the last
    position predicts nothing.
    """
    flat = hidden_btd[:, :-1]
    if triton:
        flat = flat.reshape(-1, flat.shape[-1])[:num_loss_tokens].clone()  # a choice by mask copies
        scratch = (0, 0)
    else:
        flat = flat.reshape(-1, flat.shape[-1])
        extra = TILE_BYTES["softcap"] if softcap else 0
        scratch = (TILE_BYTES["forward"], TILE_BYTES["backward"] + extra)
    log_probs: torch.Tensor = FusedLogProbs.apply(flat, weight, bias, dtype, scratch)  # type: ignore[no-untyped-call]
    return log_probs.unsqueeze(-1)
