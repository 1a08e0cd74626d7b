"""Memory of a plan: what lies on the device before a step, in closed form. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.plan.plan import Plan

Shape = Sequence[int]
_CUBLAS_BYTES = 32 * 2**20  # PyTorch's default cuBLAS workspace on Hopper; 8 MiB on earlier GPUs
_BLOCK_8BIT, _SMALL_8BIT, _SMALL_PAGED = 256, 4096, 100_000  # bitsandbytes: state blocks, and what stays fp32


@dataclass(frozen=True)
class Batch:
    """The shapes of one micro-batch.

    `num_labels` is the target's length of an encoder-decoder, `num_learnt` counts what the loss sees.
    """

    num_rows: int
    num_tokens: int
    num_labels: int
    num_learnt: int
    is_padded: bool


@dataclass(frozen=True)
class Static:
    """What follows from the trained tensors alone."""

    optimizer_blocks: tuple[int, ...]  # bytes, each a tensor of its own
    host_bytes: int  # optimizer states that live in host memory
    step_bytes: int  # what the optimizer's step takes and gives back
    workspace_bytes: int


def _blocks(optimizer: str, shape: Shape, item_bytes: int) -> tuple[list[int], int]:
    """(optimizer state tensors on the device, bytes in host memory) of one trained tensor."""
    num = math.prod(shape)
    if optimizer in {"adamw_torch", "adamw_torch_fused"}:
        return [num * item_bytes, num * item_bytes, 4], 0
    if optimizer in {"adamw_bnb_8bit", "paged_adamw_8bit"}:
        if num < _SMALL_8BIT:
            return [4 * num, 4 * num], 0
        scales = -(-num // _BLOCK_8BIT) * 4
        if optimizer == "paged_adamw_8bit" and num >= _SMALL_PAGED:
            return [scales, scales], 2 * num
        return [num, num, scales, scales], 0
    if optimizer == "adafactor":
        if len(shape) < 2:
            return [num * item_bytes], 0
        return [num // shape[-1] * item_bytes, num // shape[-2] * item_bytes], 0
    return [], 0


def _step_bytes(plan: Plan, sizes: Sequence[int]) -> int:
    """Temporaries of the optimizer's step. Sources: the code of torch.optim and of transformers' Adafactor."""
    if not sizes:
        return 0
    optimizer, on_gpu = plan.train.optimizer, plan.device == "cuda"
    if optimizer == "adamw_torch":
        # one tensor at a time: the root and its quotient. On a GPU all at once: every root
        return sum(sizes) if on_gpu and plan.method.lr_ratio is None else 2 * max(sizes)
    if optimizer == "adafactor":
        return 2 * max(sizes)
    if optimizer == "sgd" and plan.train.weight_decay:
        return sum(sizes) if on_gpu else max(sizes)
    return 0


def static_memory(plan: Plan, shapes: Sequence[Shape], item_bytes: Sequence[int]) -> Static:
    """Optimizer states and temporaries for trained tensors of these shapes."""
    blocks: list[int] = []
    host = 0
    for shape, size in zip(shapes, item_bytes, strict=True):
        found, in_host = _blocks(plan.train.optimizer, shape, size)
        blocks += found
        host += in_host
    sizes = [math.prod(shape) * size for shape, size in zip(shapes, item_bytes, strict=True)]
    workspace = _CUBLAS_BYTES if plan.device == "cuda" else 0
    return Static(tuple(blocks), host, _step_bytes(plan, sizes), workspace)
