"""TRL's fused head in shapes: log-probabilities in tiles, never all logits at once.

TRL's own asks the device for its autocast state, which the meta device cannot answer. This stands in for it:
the same saved tensors, the same tiles, the same temporaries. Source: the documentation and the source of
`trl.trainer.utils.add_fused_lm_head` and `trl.kernels.ChunkedLogProbFunction` (TRL 1.16).
"""

from __future__ import annotations

from typing import Any

import torch

from peftkit.plan.memory import TILE_BYTES, TILE_TOKENS, TILE_VOCAB


def _fp32(*size: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


class FusedHead(torch.autograd.Function):
    """(N, hidden) x (vocab, hidden) -> (N,) log-probabilities.

    `scratch` is what a tile's torch code needs beside the tile, in bytes per element, forward and backward.
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
        num, vocab = hidden.shape[0], weight.shape[0]
        targets = torch.empty(num, dtype=torch.long, device=hidden.device)
        statistics = [_fp32(num, like=hidden) for _ in range(7)]
        _tile(hidden, weight, dtype, scratch[0])
        log_z, entropy, found = (_fp32(num, like=hidden) for _ in range(3))
        del statistics
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.dtype, ctx.scratch, ctx.vocab = dtype, scratch[1], vocab
        return found

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        hidden, weight, bias, *_rest = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = _fp32(*hidden.shape, like=hidden) if wants_hidden else None
        of_weight = _fp32(*weight.shape, like=weight) if wants_weight else None
        of_bias = _fp32(*bias.shape, like=bias) if wants_bias else None
        _tile(hidden, weight, ctx.dtype, ctx.scratch, in_fp32=ctx.scratch > 0)
        return (
            None if of_hidden is None else of_hidden.to(hidden.dtype),
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


def _tile(
    hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, scratch: int, *, in_fp32: bool = False
) -> None:
    """The tensors of one tile, alive together and then gone."""
    tokens, columns = min(hidden.shape[0], TILE_TOKENS), min(weight.shape[0], TILE_VOCAB)
    buffer = torch.empty(tokens, TILE_VOCAB, dtype=dtype, device=hidden.device)
    inputs, part = hidden[:tokens].to(dtype), weight[:columns].to(dtype)
    work = torch.empty(tokens, columns, scratch, dtype=torch.uint8, device=hidden.device)
    del work
    if in_fp32:
        # without a product that adds up in fp32 the tile and its factors are copied
        copies = [buffer[:, :columns].float(), part.float(), inputs.float()]
        del copies
    del buffer, inputs, part


def fused_head(
    hidden_btd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    triton: bool,
    softcap: bool,
    num_learnt: int,
) -> torch.Tensor:
    """Log-probabilities of shape (N, 1), N the predicted positions: with Triton the learnt ones alone."""
    flat = hidden_btd[:, :-1]
    if triton:
        flat = flat.reshape(-1, flat.shape[-1])[:num_learnt].clone()  # a choice by mask copies
        scratch = (0, 0)
    else:
        flat = flat.reshape(-1, flat.shape[-1])
        extra = TILE_BYTES["softcap"] if softcap else 0
        scratch = (TILE_BYTES["forward"], TILE_BYTES["backward"] + extra)
    found: torch.Tensor = FusedHead.apply(flat, weight, bias, dtype, scratch)  # type: ignore[no-untyped-call]
    return found.unsqueeze(-1)
