"""Memory of a plan, in closed form: what lies on the device, and what a step adds at its highest point.

No torch. Weights, adapter, gradients, optimizer states and logits are counted exactly; what a forward pass
keeps follows `plan.activations`. The trace (`model.trace`) gives the same values from the real code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftkit.archs import ModelShape
from peftkit.plan.activations import is_adapted, is_fitted, kept_bytes, virtual_tokens
from peftkit.plan.plan import Batch, Memory, Peak, Plan
from peftkit.plan.targets import matches

Shape = Sequence[int]
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CUBLAS_BYTES = 32 * 2**20  # PyTorch's default cuBLAS workspace on Hopper; 8 MiB on earlier GPUs
_BLOCK_8BIT, _SMALL_8BIT, _SMALL_PAGED = 256, 4096, 100_000  # bitsandbytes: state blocks, and what stays fp32
CONTEXT_BYTES = {
    "cuda": 520 * 2**20,
    "cpu": 750 * 2**20,
    "mps": 750 * 2**20,
}  # CUDA context; Python and torch
RESERVE_SHARE = 0.04  # of what is allocated, beside it, by torch's CUDA allocator; the trace replays it
# of what comes and goes, kept by glibc: up to 0.46, in 4-bit up to 0.81 (benchmarks/process_memory.py)
RESERVE_SHARE_CPU, RESERVE_SHARE_CPU_4BIT = 0.5, 1.0
TILE_TOKENS, TILE_VOCAB = 4096, 32768  # of TRL's fused head
TILE_BYTES = {"forward": 13, "backward": 29, "softcap": 4}  # per element of a tile, where Triton is missing
# Where a family was not measured, its activations are at most so many times the closed form, and a state
# layer in plain torch keeps so many copies of its state for each token. tests/plan/test_memory.py proves it.
BOUND, BOUND_UNUSUAL, STATE_COPIES = 1.5, 4.0, 16


@dataclass(frozen=True)
class Static:
    """What follows from the trained tensors alone."""

    optimizer_blocks: tuple[int, ...]  # bytes, each a tensor of its own
    num_counters: int  # step counters of the optimizer, four bytes each
    host_bytes: int  # optimizer states that live in host memory
    step_bytes: int  # what the optimizer's step takes and gives back
    workspace_bytes: int


def _blocks(optimizer: str, shape: Shape, item_bytes: int) -> tuple[list[int], int]:
    """(optimizer state tensors on the device, bytes in host memory) of one trained tensor."""
    num = math.prod(shape)
    if optimizer in {"adamw_torch", "adamw_torch_fused"}:
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


def _step_bytes(plan: Plan, sizes: Sequence[int]) -> int:
    """Temporaries of the optimizer's step. Source: the code of torch.optim and transformers' Adafactor."""
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
    counters = len(shapes) if plan.train.optimizer.startswith("adamw_torch") else 0
    return Static(tuple(blocks), counters, host, _step_bytes(plan, sizes), workspace)


def nf4_bytes(num: int, *, double_quant: bool) -> int:
    """Bytes of `num` weights in bitsandbytes' 4-bit format: 4.127 bits each with double quantization.

    Packed weights, one scale per 64 of them, and the 16-entry code; with double quantization the scales are
    8-bit with one fp32 scale per 256, an offset and a 256-entry code (Dettmers et al. 2023, section 3).
    """
    scales = -(-num // 64)
    packed = (num + 1) // 2 + 16 * 4
    if not double_quant:
        return packed + scales * 4
    return packed + scales + -(-scales // 256) * 4 + 256 * 4 + 4


def _in_4bit(name: str, plan: Plan) -> bool:
    last = name.rsplit(".", 1)[-1]
    return plan.base.quant_type is not None and last not in plan.base.skip_4bit


def weight_bytes(shape: ModelShape, plan: Plan) -> int:
    """The base's weights: quantized where the plan says so, the rest in the plan's type."""
    item, total = ITEM_BYTES[plan.base.dtype], 0
    double = plan.base.double_quant
    for module in shape.modules:
        num = max(1, module.num) * module.d_in * module.d_out
        if module.in_experts:
            held = any(matches(module.name, ending) for ending in plan.base.experts_4bit)
        else:
            held = _in_4bit(module.name, plan)
        total += nf4_bytes(num, double_quant=double) if held else num * item
        total += (module.num_parameters - num) * item
    for tensor in shape.tensors:
        held = tensor.role == "shared adapters" and plan.base.quant_type is not None
        num = tensor.num_parameters
        total += nf4_bytes(num, double_quant=double) if held else num * item
    return total


def _trained_shapes(shape: ModelShape, plan: Plan) -> list[tuple[int, ...]]:
    """Shapes of what is trained, as far as optimizers with factors or blocks look at them."""
    spec = plan.method.peft
    if spec is None:
        found: list[tuple[int, ...]] = [(max(1, m.num) * m.d_out, m.d_in) for m in shape.modules]
        found += [(max(1, m.num) * m.d_out,) for m in shape.modules if m.bias]
        return found + [(t.num_parameters,) for t in shape.tensors]
    matrices: list[tuple[int, ...]] = []
    if "Lora" in spec.class_name:
        rank = int(spec.arguments.get("r") or spec.arguments.get("init_r", 0))
        for module in shape.modules:
            if is_adapted(module, plan):
                num = max(1, module.num)
                matrices += [(rank * num, module.d_in), (module.d_out, rank * num)]
    rest = (plan.method.num_trainable or 0) - sum(math.prod(m) for m in matrices)
    return matrices + ([(rest,)] if rest > 0 else [])


def state_bytes(shape: ModelShape, plan: Plan) -> int:
    """The optimizer's states, on the device and on the host."""
    static = held_by(shape, plan).static
    return sum(static.optimizer_blocks) + static.host_bytes


def _head_bytes(shape: ModelShape, plan: Plan, batch: Batch) -> tuple[int, int]:
    """(forward, backward) bytes of logits and loss at their highest."""
    item = 2 if plan.train.autocast else ITEM_BYTES[plan.base.dtype]
    vocab, rows = shape.dims.vocab, batch.num_rows
    if plan.base.task == "causal-lm" and not (plan.base.inferred or plan.method.token_rows):
        on_gpu = plan.device == "cuda"
        num = batch.num_learnt if on_gpu else rows * (batch.num_tokens - 1)
        tokens, columns = min(num, TILE_TOKENS), min(vocab, TILE_VOCAB)
        tile = tokens * TILE_VOCAB * item
        if on_gpu:
            return tile, tile
        softcap = TILE_BYTES["softcap"] if shape.family.name == "Gemma 2" else 0
        work = tokens * columns
        return tile + work * TILE_BYTES["forward"], tile + work * (TILE_BYTES["backward"] + softcap)
    if plan.base.task in {"causal-lm", "seq2seq"}:
        length = batch.num_labels if plan.base.task == "seq2seq" else batch.num_tokens
        whole = rows * length * vocab
        return whole * (2 * item + (4 if item == 2 else 0) + 4), whole * 12
    return 0, 0


def evaluation_rows(plan: Plan) -> int:
    """How many held-out rows one pass takes: at least eight on a CPU, and where a micro-batch is of packs."""
    few = plan.device == "cpu" or plan.train.packing
    return max(8, plan.train.micro_batch) if few else plan.train.micro_batch


def evaluation_batch(batch: Batch) -> Batch:
    """Held-out rows that are looked at together."""
    rows, tokens = batch.eval_rows, batch.eval_tokens
    return Batch(rows, tokens, batch.eval_labels, rows * (tokens - 1), is_padded=rows > 1)


def generation_bytes(shape: ModelShape, plan: Plan, batch: Batch) -> int:
    """Keys, values and states that generation keeps, for the prompts that are answered at once."""
    length = batch.eval_tokens + plan.evaluate.max_new_tokens + virtual_tokens(plan)
    numbers = shape.cache_at(length) + shape.state_per_sequence
    return plan.evaluate.generation_batch * numbers * ITEM_BYTES[plan.base.dtype]


def _kept(shape: ModelShape, plan: Plan, batch: Batch, *, fitted: bool) -> dict[str, int]:
    """`kept_bytes`, or an upper bound of it where the family was not measured."""
    found = kept_bytes(shape, plan, batch)
    if fitted:
        return {name: int(size) for name, size in found.items()}
    unusual = shape.family.has_experts or shape.family.is_recurrent
    times = BOUND_UNUSUAL if unusual else BOUND
    tokens = batch.num_rows * batch.num_tokens
    states = tokens * shape.state_per_sequence * 4 * STATE_COPIES
    if plan.train.gradient_checkpointing == "full":
        states //= max(1, shape.dims.num_layers)  # of the layer that is worked out again
    return {name: int(times * size) + (states if name != "casts" else 0) for name, size in found.items()}


@dataclass(frozen=True)
class Held:
    """What lies there whatever the batch: the base's weights, and what follows from the trained tensors."""

    weight_bytes: int
    static: Static


def held_by(shape: ModelShape, plan: Plan) -> Held:
    """What a plan holds throughout: it hangs on base, method and optimizer alone."""
    shapes = _trained_shapes(shape, plan)
    item = ITEM_BYTES[plan.base.dtype] if plan.method.peft is None else 4
    return Held(weight_bytes(shape, plan), static_memory(plan, shapes, [item] * len(shapes)))


def closed_form(shape: ModelShape, plan: Plan, batch: Batch, *, fixed: Held | None = None) -> Memory:
    """The memory of `plan` on `batch` without running anything. `fixed` is `held_by`, where it is known."""
    whole = plan.method.peft is None
    item = ITEM_BYTES[plan.base.dtype] if whole else 4
    trainable = (plan.method.num_trainable or 0) * item
    fixed = fixed or held_by(shape, plan)
    static = fixed.static
    fitted = is_fitted(shape, plan)
    kept = _kept(shape, plan, batch, fitted=fitted)
    held = {
        "base weights": fixed.weight_bytes,
        "adapter": 0 if whole else trainable,
        "optimizer": sum(static.optimizer_blocks),
        "workspaces": static.workspace_bytes,
    }
    forward, backward = _head_bytes(shape, plan, batch)
    earlier = trainable if plan.train.accumulation > 1 else 0
    activations, passing = kept["activations"], kept["temporaries"]
    redone = kept["recomputed layer"]
    top = {"gradients": earlier, "activations": activations, "logits and loss": backward}
    deep = {"gradients": earlier, "activations": activations, "recomputed layer": redone}
    late = {"gradients": trainable, "recomputed layer": redone, "temporaries": passing}
    backwards = [top, {**deep, "temporaries": passing} if redone else late, late]
    peaks = [
        Peak("forward", _sum(held, {**top, "logits and loss": forward, "temporaries": kept["casts"]})),
        max((Peak("backward", _sum(held, one)) for one in backwards), key=lambda p: p.allocated_bytes),
        Peak("optimizer step", _sum(held, {"gradients": trainable, "temporaries": static.step_bytes})),
    ]
    if batch.eval_rows:
        seen = evaluation_batch(batch)
        logits, _ = _head_bytes(shape, plan, seen)
        inside = passing * seen.num_rows * seen.num_tokens // max(1, batch.num_rows * batch.num_tokens)
        more = {"logits and loss": logits, "temporaries": max(kept["casts"], inside)}
        peaks.append(Peak("evaluation", _sum(held, more)))
    peaks += between_steps(shape, plan, batch, held)
    highest = max(peak.allocated_bytes for peak in peaks)
    on_gpu = plan.device == "cuda"
    reserve = int(highest * RESERVE_SHARE) if on_gpu else kept_by_malloc(plan, peaks)
    return Memory(
        depth="closed form",
        peaks=tuple(peaks),
        reserved_bytes=highest + reserve,
        context_bytes=CONTEXT_BYTES[plan.device],
        host_bytes=static.host_bytes,
        bound="" if fitted else f"activations of {shape.family.name} are an upper bound",
    )


def between_steps(shape: ModelShape, plan: Plan, batch: Batch, held: Mapping[str, int]) -> list[Peak]:
    """The peaks of a checkpoint's write, which copies nothing on the device, and of generation."""
    found = [Peak("checkpoint write", _sum(held, {}))]
    if batch.eval_rows and plan.evaluate.metric in {"exact_match", "token_f1"}:
        found.append(Peak("generation", _sum(held, {"cache": generation_bytes(shape, plan, batch)})))
    return found


def kept_by_malloc(plan: Plan, peaks: Sequence[Peak]) -> int:
    """What a CPU's process keeps of freed memory at the most: glibc gives pages back late and in pieces."""
    sizes = [peak.allocated_bytes for peak in peaks]
    share = RESERVE_SHARE_CPU_4BIT if plan.base.quant_type else RESERVE_SHARE_CPU
    return int(share * (max(sizes) - min(sizes)))


def _sum(held: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in {**held, **more}.items() if size}
