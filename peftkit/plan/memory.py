"""Memory of a plan in closed form: what stays on the device, and what a step adds at its peak.

No torch. Weights, adapter, gradients, optimizer states and logits are counted exactly; activations follow
`plan.activations`. The trace (`model.meta.trace`) gives the same values from the real code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftkit.archs import ModelShape
from peftkit.objectives import OBJECTIVES
from peftkit.plan.activations import activation_bytes, is_fitted, lora_rank, virtual_tokens
from peftkit.plan.plan import Batch, Memory, Peak, Plan
from peftkit.plan.schedule import SCHEDULE_FREE
from peftkit.plan.targets import matches_target
from peftkit.plan.task import trainer_spec

TensorShape = Sequence[int]
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CUBLAS_BYTES = 32 * 2**20  # PyTorch's default cuBLAS workspace on Hopper; 8 MiB on earlier GPUs
_BLOCK_8BIT, _SMALL_8BIT, _SMALL_PAGED = 256, 4096, 100_000  # bitsandbytes: state blocks, and what stays fp32
CONTEXT_BYTES = {"cuda": 520 * 2**20, "cpu": 750 * 2**20, "mps": 750 * 2**20}  # CUDA context; Python and torch
RESERVE_SHARE = 0.04  # of what is allocated, beside it, by torch's CUDA allocator; the trace replays it
RESERVE_SHARE_CPU = 1.0  # of what comes and goes, kept by glibc: 0.60 and 0.84 were seen (benchmarks/process_memory.py)
TILE_TOKENS, TILE_VOCAB = 4096, 32768  # of TRL's fused head
TILE_BYTES = {"forward": 13, "backward": 29, "softcap": 4}  # per element of a tile, where Triton is missing
# Where a family was not measured, its activations are at most so many times the closed form, and a state
# layer in plain torch keeps so many copies of its state for each token. tests/plan/test_memory.py proves it.
BOUND_FACTOR, BOUND_FACTOR_UNUSUAL, STATE_COPIES = 1.5, 4.0, 16


@dataclass(frozen=True)
class OptimizerMemory:
    """Memory that follows from the trained tensors alone: optimizer states and temporaries."""

    optimizer_blocks: tuple[int, ...]  # bytes, each a tensor of its own
    num_counters: int  # step counters of the optimizer, four bytes each
    host_bytes: int  # optimizer states that live in host memory
    step_bytes: int  # what the optimizer's step takes and gives back
    workspace_bytes: int


def _optimizer_states(optimizer: str, shape: TensorShape, item_bytes: int) -> tuple[list[int], int]:
    """Return (optimizer state tensors on the device, bytes in host memory) of one trained tensor."""
    num = math.prod(shape)
    if optimizer in {"adamw_torch", "adamw_torch_fused", SCHEDULE_FREE}:
        return [num * item_bytes, num * item_bytes], 0
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


def _optimizer_step_bytes(plan: Plan, sizes: Sequence[int]) -> int:
    """Return the temporaries of the optimizer's step.

    Source: the code of torch.optim, transformers' Adafactor, and schedulefree.
    """
    if not sizes:
        return 0
    optimizer, on_gpu = plan.train.optimizer, plan.device == "cuda"
    if optimizer == "adamw_torch":
        # one tensor at a time: the root and its quotient. On a GPU all at once: every root
        return sum(sizes) if on_gpu and plan.method.lr_ratio is None else 2 * max(sizes)
    if optimizer == SCHEDULE_FREE:
        return sum(sizes)  # all at once: every root
    if optimizer == "adafactor":
        return 2 * max(sizes)
    if optimizer == "sgd" and plan.train.weight_decay:
        return sum(sizes) if on_gpu else max(sizes)
    return 0


def optimizer_memory(plan: Plan, shapes: Sequence[TensorShape], item_bytes: Sequence[int]) -> OptimizerMemory:
    """Compute optimizer states and temporaries for trained tensors of these shapes."""
    blocks: list[int] = []
    host_bytes = 0
    for shape, size in zip(shapes, item_bytes, strict=True):
        states, host_state_bytes = _optimizer_states(plan.train.optimizer, shape, size)
        blocks += states
        host_bytes += host_state_bytes
    sizes = [math.prod(shape) * size for shape, size in zip(shapes, item_bytes, strict=True)]
    workspace = _CUBLAS_BYTES if plan.device == "cuda" else 0
    counters = len(shapes) if plan.train.optimizer.startswith("adamw_torch") else 0
    return OptimizerMemory(tuple(blocks), counters, host_bytes, _optimizer_step_bytes(plan, sizes), workspace)


def nf4_bytes(num: int, *, double_quant: bool) -> int:
    """Return the bytes of `num` weights in bitsandbytes' 4-bit format.

    Packed weights, one scale per 64 of them, and the 16-entry code; with double quantization the scales are
    8-bit with one fp32 scale per 256, an offset and a 256-entry code: 4.127 bits per weight (Dettmers et al.
    2023, section 3).

    4-bit:         num / 2 + 64 + 4 * num / 64
    double quant:  num / 2 + 64 + num / 64 + 4 * num / (64 * 256) + 1028
    """
    scales = -(-num // 64)
    packed = (num + 1) // 2 + 16 * 4
    if not double_quant:
        return packed + scales * 4
    return packed + scales + -(-scales // 256) * 4 + 256 * 4 + 4


def weight_bytes(shape: ModelShape, plan: Plan) -> int:
    """Count the bytes of the base's weights: 4-bit where the plan says so, the rest in its dtype."""
    item, total = ITEM_BYTES[plan.base.dtype], 0
    double = plan.base.double_quant
    for module in shape.modules:
        num = max(1, module.num) * module.d_in * module.d_out
        if module.in_experts:
            is_quantized = any(matches_target(module.name, ending) for ending in plan.base.experts_4bit)
        else:
            last = module.name.rsplit(".", 1)[-1]
            is_quantized = plan.base.quant_type is not None and last not in plan.base.skip_4bit
        total += nf4_bytes(num, double_quant=double) if is_quantized else num * item
        total += (module.num_parameters - num) * item
    for tensor in shape.tensors:
        is_quantized = tensor.role == "shared adapters" and plan.base.quant_type is not None
        num = tensor.num_parameters
        total += nf4_bytes(num, double_quant=double) if is_quantized else num * item
    return total


def state_bytes(shape: ModelShape, plan: Plan) -> int:
    """Return the bytes of the optimizer's states, on the device and on the host."""
    optimizer = fixed_memory(shape, plan).static
    return sum(optimizer.optimizer_blocks) + optimizer.host_bytes


def _head_bytes(shape: ModelShape, plan: Plan, batch: Batch) -> tuple[int, int]:
    """Return (forward, backward) peak bytes of logits and loss."""
    item = 2 if plan.train.autocast else ITEM_BYTES[plan.base.dtype]
    vocab, rows = shape.dims.vocab, batch.num_rows
    if trainer_spec(plan).loss == "fused":
        on_gpu = plan.device == "cuda"
        num = batch.num_learnt if on_gpu else rows * (batch.num_tokens - 1)
        tokens, columns = min(num, TILE_TOKENS), min(vocab, TILE_VOCAB)
        tile = tokens * TILE_VOCAB * item
        if on_gpu:
            return tile, tile
        softcap = TILE_BYTES["softcap"] if shape.family.name == "Gemma 2" else 0
        tile_elements = tokens * columns
        return tile + tile_elements * TILE_BYTES["forward"], tile + tile_elements * (TILE_BYTES["backward"] + softcap)
    if OBJECTIVES[plan.base.task].generates_answers:
        length = batch.num_labels if plan.base.task == "seq2seq" else batch.num_tokens
        num_logits = rows * length * vocab
        return num_logits * (2 * item + (4 if item == 2 else 0) + 4), num_logits * 12
    return 0, 0


def evaluation_rows(plan: Plan) -> int:
    """Return the held-out rows per pass: at least eight on a CPU, and if micro-batches are packs."""
    is_limited = plan.device == "cpu" or plan.train.packing
    return max(8, plan.train.micro_batch) if is_limited else plan.train.micro_batch


def evaluation_batch(batch: Batch) -> Batch:
    """Return the batch of held-out rows that are evaluated together."""
    rows, tokens = batch.eval_rows, batch.eval_tokens
    return Batch(rows, tokens, batch.eval_labels, rows * (tokens - 1), is_padded=rows > 1)


def generation_bytes(shape: ModelShape, plan: Plan, batch: Batch) -> int:
    """Return the bytes of keys, values and states for the prompts that are answered at once."""
    length = batch.eval_tokens + plan.evaluate.max_new_tokens + virtual_tokens(plan)
    numbers = shape.cache_at(length) + shape.state_per_sequence
    return plan.evaluate.generation_batch * numbers * ITEM_BYTES[plan.base.dtype]


@dataclass(frozen=True)
class FixedMemory:
    """Memory that does not depend on the batch: the base's weights, and the optimizer's."""

    weight_bytes: int
    static: OptimizerMemory


def fixed_memory(shape: ModelShape, plan: Plan) -> FixedMemory:
    """Compute the memory that a plan needs throughout; depends on base, method and optimizer only."""
    spec = plan.method.peft
    if spec is None:
        weight_shapes: list[tuple[int, ...]] = [(max(1, m.num) * m.d_out, m.d_in) for m in shape.modules]
        weight_shapes += [(max(1, m.num) * m.d_out,) for m in shape.modules if m.bias]
        shapes = weight_shapes + [(t.num_parameters,) for t in shape.tensors]
    else:
        matrices: list[tuple[int, ...]] = []
        for module in shape.modules:
            if rank := lora_rank(module, plan) * max(1, module.num):
                matrices += [(rank, module.d_in), (module.d_out, rank)]
        rest = (plan.method.num_trainable or 0) - sum(math.prod(m) for m in matrices)
        shapes = matrices + ([(rest,)] if rest > 0 else [])
    item = ITEM_BYTES[plan.base.dtype] if plan.method.peft is None else 4
    return FixedMemory(weight_bytes(shape, plan), optimizer_memory(plan, shapes, [item] * len(shapes)))


def closed_form_memory(shape: ModelShape, plan: Plan, batch: Batch, *, fixed_part: FixedMemory | None = None) -> Memory:
    """Compute the memory of `plan` on `batch` without running anything.

    `fixed_part` is the plan's `fixed_memory`, if it is known already.
    """
    is_full = plan.method.peft is None
    item = ITEM_BYTES[plan.base.dtype] if is_full else 4
    trainable = (plan.method.num_trainable or 0) * item
    fixed_part = fixed_part or fixed_memory(shape, plan)
    optimizer = fixed_part.static
    is_measured = is_fitted(shape, plan)
    bytes_by_kind = activation_bytes(shape, plan, batch)
    if is_measured:
        activation_parts = {name: int(size) for name, size in bytes_by_kind.items()}
    else:
        is_unusual = shape.family.has_experts or shape.family.is_recurrent
        factor = BOUND_FACTOR_UNUSUAL if is_unusual else BOUND_FACTOR
        tokens = batch.num_rows * batch.num_tokens
        states = tokens * shape.state_per_sequence * 4 * STATE_COPIES
        if plan.train.gradient_checkpointing == "full":
            states //= max(1, shape.dims.num_layers)  # of the layer that is worked out again
        activation_parts = {
            name: int(factor * size) + (states if name != "casts" else 0) for name, size in bytes_by_kind.items()
        }
    resident = {
        "base weights": fixed_part.weight_bytes,
        "adapter": 0 if is_full else trainable,
        "optimizer": sum(optimizer.optimizer_blocks),
        "workspaces": optimizer.workspace_bytes,
        "buckets": trainable if plan.ranks.num > 1 else 0,  # in which DDP adds up gradients
    }
    forward, backward = _head_bytes(shape, plan, batch)
    accumulated = trainable if plan.train.accumulation > plan.ranks.num else 0
    activations, temporaries = activation_parts["activations"], activation_parts["temporaries"]
    recomputed = activation_parts["recomputed layer"]
    at_head = {"gradients": accumulated, "activations": activations, "logits and loss": backward}
    in_layers = {"gradients": accumulated, "activations": activations, "recomputed layer": recomputed}
    at_end = {"gradients": trainable, "recomputed layer": recomputed, "temporaries": temporaries}
    backwards = [at_head, {**in_layers, "temporaries": temporaries} if recomputed else at_end, at_end]
    peaks = [
        Peak(
            "forward",
            _merge_components(
                resident, {**at_head, "logits and loss": forward, "temporaries": activation_parts["casts"]}
            ),
        ),
        max(
            (Peak("backward", _merge_components(resident, components)) for components in backwards),
            key=lambda p: p.allocated_bytes,
        ),
        Peak(
            "optimizer step", _merge_components(resident, {"gradients": trainable, "temporaries": optimizer.step_bytes})
        ),
    ]
    if batch.eval_rows:
        eval_batch = evaluation_batch(batch)
        logits, _ = _head_bytes(shape, plan, eval_batch)
        eval_temporaries = (
            temporaries * eval_batch.num_rows * eval_batch.num_tokens // max(1, batch.num_rows * batch.num_tokens)
        )
        eval_components = {"logits and loss": logits, "temporaries": max(activation_parts["casts"], eval_temporaries)}
        peaks.append(Peak("evaluation", _merge_components(resident, eval_components)))
    peaks += peaks_between_steps(shape, plan, batch, resident)
    highest = max(peak.allocated_bytes for peak in peaks)
    on_gpu = plan.device == "cuda"
    reserve = int(highest * RESERVE_SHARE) if on_gpu else malloc_reserve_bytes(peaks)
    return Memory(
        depth="closed form",
        peaks=tuple(peaks),
        reserved_bytes=highest + reserve,
        context_bytes=CONTEXT_BYTES[plan.device],
        host_bytes=optimizer.host_bytes,
        bound="" if is_measured else f"activations of {shape.family.name} are an upper bound",
    )


def peaks_between_steps(shape: ModelShape, plan: Plan, batch: Batch, resident: Mapping[str, int]) -> list[Peak]:
    """Return the peaks of a checkpoint write, which copies nothing on the device, and of generation."""
    peaks = [Peak("checkpoint write", _merge_components(resident, {}))]
    if batch.eval_rows and plan.evaluate.metric and OBJECTIVES[plan.base.task].generates_answers:
        peaks.append(Peak("generation", _merge_components(resident, {"cache": generation_bytes(shape, plan, batch)})))
    return peaks


def malloc_reserve_bytes(peaks: Sequence[Peak]) -> int:
    """Return the upper bound of freed memory that a CPU process keeps.

    glibc returns pages late and in pieces.
    """
    sizes = [peak.allocated_bytes for peak in peaks]
    return int(RESERVE_SHARE_CPU * (max(sizes) - min(sizes)))


def _merge_components(resident: Mapping[str, int], extra: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in {**resident, **extra}.items() if size}
