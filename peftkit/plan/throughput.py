"""Compute, time, disk and price of a plan. Pure: speeds come from measured runs, never from a guess."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from peftkit.archs import ModelShape
from peftkit.plan.activations import group_layers, num_untouched_layers
from peftkit.plan.facts import Facts
from peftkit.plan.memory import ITEM_BYTES, state_bytes
from peftkit.plan.packing import mean_row_tokens
from peftkit.plan.plan import Plan

_TOKENS_PER_PARAMETER = 20  # compute-optimal pre-training (Hoffmann et al. 2022)
_NUM_CHECKPOINTS = 3  # the newest two and the best


@dataclass(frozen=True)
class RunCost:
    """The cost of a run. Seconds are None if nothing was measured on this device yet."""

    flops_per_step: float
    tokens_per_step: float
    tokens_per_second: float | None
    seconds: float | None
    price: float | None
    checkpoint_bytes: int  # on disk, all that are kept
    result_bytes: int
    download_bytes: int
    tokens_per_trainable: float | None
    share_of_optimal: float | None  # tokens of the run against the compute-optimal number


def active_parameters(shape: ModelShape) -> int:
    """Count the parameters that each token passes: of a mixture's experts, those that it is routed to."""
    active = 0
    for module in shape.modules:
        is_routed = module.in_experts and module.num and shape.experts_per_token
        share = shape.experts_per_token / module.num if is_routed else 1.0
        active += int(module.num_parameters * min(1.0, share))
    skipped = {"embeddings"} if not shape.tied_embeddings else set()
    return active + sum(t.num_parameters for t in shape.tensors if t.role not in skipped)


def flops_per_token(shape: ModelShape, plan: Plan, length: float) -> float:
    """Return the floating-point operations per trained token.

    2 per parameter forwards, 2 backwards for activations, 2 more for trained weights, 2 for recomputed
    layers; attention adds 2 x length x width per layer (Kaplan et al. 2020, table 1). Layers below the first that
    is adapted are passed forwards alone, unless they are recomputed.
    """
    passes = 4.0
    if plan.method.peft is None:
        passes += 2.0
    passes += {"none": 0.0, "selective": 1.0, "full": 2.0}[plan.train.gradient_checkpointing]
    attention = length * shape.dims.q * shape.num_cached_layers  # each pass counts 2 of it
    adapter = 6.0 * (plan.method.num_trainable or 0) if plan.method.peft is not None else 0.0
    blocks = group_layers(shape)
    below = num_untouched_layers(blocks, shape, plan)
    lower = replace(shape, modules=tuple(m for block in blocks[:below] for m in block.modules), tensors=())
    forwards_alone = (active_parameters(lower) + attention * below / len(blocks)) if below else 0.0
    return passes * (active_parameters(shape) + attention - forwards_alone) + 2.0 * forwards_alone + adapter


def speed_key(plan: Plan) -> str:
    """Return the key of measured speeds: types, 4-bit or not, recomputation, the size within x4, and processes."""
    kind = plan.train.autocast or plan.base.dtype
    quantized = " 4-bit" if plan.base.quant_type else ""
    size = 4 ** round(math.log(max(1, plan.method.num_parameters), 4)) / 1e6
    ranks = f", {plan.ranks.num} processes" if plan.ranks.num > 1 else ""
    return f"{kind}{quantized} {plan.train.gradient_checkpointing}, about {size:.3g}M parameters{ranks}"


def estimate_cost(
    shape: ModelShape, plan: Plan, facts: Facts, speeds: Mapping[str, float], price_per_hour: float | None
) -> RunCost:
    """Estimate the cost of a run. `speeds` maps a `speed_key` to measured FLOP/s on this device."""
    mean = mean_row_tokens(plan, facts)
    tokens = mean * plan.train.batch_size
    flops = flops_per_token(shape, plan, mean) * tokens
    speed = speeds.get(speed_key(plan))
    steps = plan.train.num_steps
    seconds = flops / speed * steps if speed and steps else None
    trainable = plan.method.num_trainable or 0
    item = ITEM_BYTES[plan.base.dtype] if plan.method.peft is None else 4
    all_tokens = tokens * steps if steps else None
    return RunCost(
        flops_per_step=flops,
        tokens_per_step=tokens,
        tokens_per_second=speed / flops * tokens if speed else None,
        seconds=seconds,
        price=plan.ranks.num * seconds / 3600 * price_per_hour if seconds and price_per_hour else None,
        checkpoint_bytes=(trainable * item + state_bytes(shape, plan)) * _NUM_CHECKPOINTS,
        result_bytes=trainable * item,
        download_bytes=2 * shape.num_parameters if plan.base.kind == "hub" else 0,
        tokens_per_trainable=all_tokens / trainable if all_tokens and trainable else None,
        share_of_optimal=all_tokens / (_TOKENS_PER_PARAMETER * shape.num_parameters) if all_tokens else None,
    )


def missing_kernels(shape: ModelShape) -> tuple[str, ...]:
    """Return the packages that a family is slow without on a GPU, and that are not installed."""
    return tuple(name for name in shape.family.kernels if importlib.util.find_spec(name) is None)


def describe_missing_kernels(packages: tuple[str, ...]) -> str:
    """Describe what missing kernels cost, and how to install them."""
    return (
        f"not installed: {', '.join(packages)}. Its state layers then run in plain torch, slower and with "
        f"more memory (see docs/families.md): pip install {' '.join(packages)}"
    )
