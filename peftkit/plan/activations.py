"""Activation memory of a forward pass in closed form: bytes per token, layer by layer. No torch.

The rules follow what autograd saves in transformers' own layers. A product saves its input if its weight is
trained; an activation saves its input; a gate saves both factors; fused attention saves queries, keys,
values, its output and one number per head; RMSNorm saves its input in fp32. They hold for dense decoders;
elsewhere they are a bound (`plan.memory.BOUND_FACTOR`), and the trace is exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from peftkit.archs import ModelShape, Module
from peftkit.archs.family import Tensor
from peftkit.plan.plan import Batch, Plan
from peftkit.plan.targets import layer_position, matches_target

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
# Tensors of the feed-forward's width that an activation saves, where it is not one.
_SAVED_BY_ACTIVATION = {"gelu_new": 4, "gelu_fast": 6, "quick_gelu": 2, "relu2": 2, "bloom gelu": 1}
_INPUT_GROUPS = {"q": "qkv", "k": "qkv", "v": "qkv", "qkv": "qkv", "gate": "mlp", "up": "mlp", "gate_up": "mlp"}


@dataclass(frozen=True)
class ItemBytes:
    """Bytes per number: of hidden states, of the outputs of products, of trained adapters."""

    hidden: int
    product: int
    adapter: int
    autocast: bool

    @property
    def is_mixed(self) -> bool:
        """True if hidden states are fp32 and products 16-bit: each product casts its own input."""
        return self.hidden != self.product

    @property
    def copies_inputs(self) -> bool:
        """True if each adapter casts its own input."""
        return self.product != self.adapter or self.is_mixed


def item_bytes_of(plan: Plan) -> ItemBytes:
    """Return the bytes per number that flow through this plan's model."""
    item = {"float32": 4, "bfloat16": 2, "float16": 2}[plan.base.dtype]
    autocast = plan.train.autocast is not None
    return ItemBytes(item, 2 if autocast else item, 4, autocast)


@dataclass
class Layer:
    """The modules and norms of one layer. Layers of one `kind` differ in nothing but their names."""

    modules: list[Module] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    kind: int = 0

    def size(self, *roles: str) -> int:
        """Return the output size of the first module with one of the roles; 0 if there is none."""
        return next((m.d_out for m in self.modules if m.role in roles), 0)


def group_layers(shape: ModelShape) -> tuple[Layer, ...]:
    """Group the modules and norms of a shape by layer, in order. Modules outside any layer are left out."""
    return _group_layers(shape.modules, shape.tensors)


@lru_cache(maxsize=8)
def _group_layers(modules: tuple[Module, ...], tensors: tuple[Tensor, ...]) -> tuple[Layer, ...]:
    layers: dict[str, Layer] = {}
    for module in modules:
        block = _BLOCK.match(f"{module.name}.")
        if block:
            layers.setdefault(block[1], Layer()).modules.append(module)
    for tensor in tensors:
        block = _BLOCK.match(f"{tensor.name}.")
        if block and tensor.role in {"norms", "gated norms"}:
            layers.setdefault(block[1], Layer()).norms.append(tensor)
    kinds: dict[Any, int] = {}
    for layer in layers.values():
        parts = tuple(replace(part, name=part.name.rsplit(".", 1)[-1]) for part in layer.modules)
        norms = tuple((norm.role, norm.num_parameters) for norm in layer.norms)
        layer.kind = kinds.setdefault((parts, norms), len(kinds))
    return tuple(layers.values())


@dataclass(frozen=True)
class LayerActivations:
    """Bytes per token that one layer saves, and the temporary bytes of its backward pass."""

    saved: float
    temporary: float


def _norm_bytes(layer: Layer, shape: ModelShape, plan: Plan, types: ItemBytes) -> float:
    """Sum the norms: their inputs, and what trained weights need of the normalised values."""
    rms = shape.family.norm == "RMSNorm"
    total = 0.0
    for tensor in layer.norms:
        width = tensor.num_parameters if rms else tensor.num_parameters // 2
        num_norms = 1
        last = tensor.name.rsplit(".", 1)[-1]
        if last[:2] in {"q_", "k_"} and width == shape.dims.head_dim:  # each head is normed
            num_norms = shape.dims.heads if last[0] == "q" else shape.dims.kv_heads
            width *= num_norms
        total += num_norms * (4 if rms else 8)  # root mean square; or mean and deviation
        if rms:
            total += 4 * width
            is_trained = plan.method.peft is None or plan.method.name == "ln"
            total += types.hidden * width if is_trained else 0
        else:
            total += (4 if types.autocast else types.hidden) * width
    return total


def _attention_bytes(layer: Layer, shape: ModelShape, plan: Plan, types: ItemBytes, batch: Batch) -> float:
    """Sum queries, keys, values and output; with a mask, keys and values are expanded to every head.

    Eager attention saves the scores instead, in fp32 and in the type of products.
    """
    dims = shape.dims
    if not layer.size("q", "qkv"):
        return 0.0
    num_keys = batch.num_tokens + virtual_tokens(plan)
    if plan.base.attention == "sdpa":
        has_window = shape.num_windowed > 0 and batch.num_tokens >= shape.window
        has_mask = batch.is_padded or batch.is_packed or has_window or plan.method.name == "prefix"
        key_size = dims.q if has_mask else dims.kv
        ratio = num_keys / batch.num_tokens
        mask = num_keys * types.product if has_mask else 0
        return (2 * dims.q + 2 * key_size * ratio) * types.product + 4 * dims.heads + mask
    scores = dims.heads * num_keys
    score_bytes = scores * 4 + (scores * types.product if types.product != 4 else 0)
    return score_bytes + 3 * dims.q * types.product


def virtual_tokens(plan: Plan) -> int:
    """Return the number of tokens that the method puts before the text."""
    spec = plan.method.peft
    return int(spec.arguments.get("num_virtual_tokens", 0)) if spec is not None else 0


def layer_activations(
    layer: Layer, shape: ModelShape, plan: Plan, batch: Batch, correction: float = 0.0
) -> LayerActivations:
    """Compute what one layer saves per token of the batch, with the family's measured correction."""
    types = item_bytes_of(plan)
    adapted_modules = [m for m in layer.modules if is_adapted(m, plan)]
    saved_bytes = _norm_bytes(layer, shape, plan, types)
    saved_bytes += _attention_bytes(layer, shape, plan, types, batch)
    width = layer.size("gate", "up") or layer.size("gate_up") // 2
    if not width:
        feed_forward_bytes = 0.0
    else:
        num_saved = _SAVED_BY_ACTIVATION.get(shape.activation, 1)
        num_gate_factors = 2 if layer.size("gate", "gate_up") else 0
        feed_forward_bytes = (num_saved + num_gate_factors) * width * types.product
    saved_bytes += feed_forward_bytes
    if plan.method.name == "ia3":
        saved_bytes += sum(m.d_in * 4 if m.role == "down" else m.d_out * types.product for m in adapted_modules)
    else:
        # what adapters save beside their inputs
        item = types.product if types.autocast else types.adapter
        adapter_bytes = sum(float(lora_rank(module, plan) * item) for module in adapted_modules)
        # sum the inputs of products whose weights, or whose adapters, are trained
        is_full = plan.method.peft is None
        input_bytes, counted_groups = 0.0, set()
        for module in adapted_modules:
            group = _INPUT_GROUPS.get(module.role, module.role)
            is_attention_output = module.role == "o" and plan.base.attention == "sdpa"
            has_own_copy = types.is_mixed if is_full else types.copies_inputs
            if has_own_copy and not (is_full and is_attention_output):
                input_bytes += module.d_in * (types.product if types.autocast else types.adapter)
            elif group not in counted_groups:
                counted_groups.add(group)
                input_bytes += 0 if is_attention_output else module.d_in * types.hidden
        saved_bytes += input_bytes + adapter_bytes
    width = layer.size("gate", "up") or layer.size("gate_up") // 2
    temporary_bytes: float = max(3 * width * types.product, 2 * shape.dims.hidden * 4)
    if plan.base.attention == "eager":
        temporary_bytes = max(temporary_bytes, 2.0 * shape.dims.heads * batch.num_tokens * 4)
    return LayerActivations(saved_bytes + correction, temporary_bytes)


def is_adapted(module: Module, plan: Plan) -> bool:
    """Return True if the method trains something at this module."""
    spec = plan.method.peft
    if spec is None or module.name in spec.arguments.get("modules_to_save", ()):
        return True
    return _is_target(module.name, plan.method.target_modules)


def lora_rank(module: Module, plan: Plan) -> int:
    """Return the rank at which LoRA adapts this module at the start; 0 where it does not."""
    spec = plan.method.peft
    if spec is None or "Lora" not in spec.class_name or not _is_target(module.name, plan.method.target_modules):
        return 0
    usual = int(spec.arguments.get("r") or spec.arguments.get("init_r", 0))
    pattern = spec.arguments.get("rank_pattern", {})
    return next((int(rank) for ending, rank in pattern.items() if matches_target(module.name, ending)), usual)


@lru_cache(maxsize=2**16)
def _is_target(name: str, targets: tuple[str, ...]) -> bool:
    return any(matches_target(name, ending) for ending in targets)


def num_untouched_layers(blocks: Sequence[Layer], shape: ModelShape, plan: Plan) -> int:
    """Return how many layers at the bottom have nothing to train above their input: in one stack, by targets alone."""
    spec = plan.method.peft
    if plan.train.gradient_checkpointing != "none":
        return 0  # it makes the embeddings' output require a gradient
    if spec is None or not plan.method.target_modules or plan.method.token_rows or len(shape.family.stacks) > 1:
        return 0
    named = {module.name for module in shape.modules} | {shape.family.head, *shape.task_head.modules}
    if not named.issuperset(spec.arguments.get("modules_to_save", ())):
        return 0  # the embeddings, or norms
    return next((i for i, block in enumerate(blocks) if any(is_adapted(m, plan) for m in block.modules)), 0)


def _unpacked_expert_bytes(layer: Layer, plan: Plan) -> float:
    """Return the bytes of 4-bit experts, which are dequantized whole and saved for the backward pass."""
    if not plan.base.experts_4bit:
        return 0.0
    item = item_bytes_of(plan).hidden
    return sum(item * m.num * m.d_in * m.d_out for m in layer.modules if m.in_experts)


FEATURES = ("hidden", "queries", "keys", "feed-forward", "scores", "tokens", "heads", "one")


def layer_features(layer: Layer, shape: ModelShape, batch: Batch) -> list[float]:
    """Return the sizes in which a family's correction is linear, in the order of `FEATURES`."""
    dims = shape.dims
    width = layer.size("gate", "up") or layer.size("gate_up") // 2
    length = batch.num_tokens
    return [dims.hidden, dims.q, dims.kv, width, dims.heads * length, length, dims.heads, 1]


def correction_key(plan: Plan) -> str:
    """Return the key of the measured corrections: the types that flow, and full or adapter training."""
    types = item_bytes_of(plan)
    scope = "full" if plan.method.peft is None else "adapter"
    return f"{types.hidden}/{types.product}{' autocast' if types.autocast else ''} {scope}"


def is_fitted(shape: ModelShape, plan: Plan) -> bool:
    """Return True if this family was measured in this mode: then the closed form is within a few percent."""
    return correction_key(plan) in measured_corrections().get(shape.model_type, {})


@cache
def measured_corrections() -> Mapping[str, Any]:
    """Load the measured corrections: bytes per token by family, mode and feature."""
    path = resources.files("peftkit.archs") / "data" / "activations.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _linear_correction(coefficients: Mapping[str, float], values: Iterable[float]) -> float:
    return sum(coefficients.get(name, 0.0) * value for name, value in zip(FEATURES, values, strict=True))


def activation_bytes(
    shape: ModelShape, plan: Plan, batch: Batch, *, corrections: Mapping[str, Any] | None = None
) -> Mapping[str, float]:
    """Estimate bytes by kind for one micro-batch.

    `activations` are saved until the backward pass, `recomputed layer` is one checkpointed layer,
    `temporaries` are freed within the pass, `casts` are the weights that autocast caches to the end of the
    forward pass. `corrections` defaults to those measured for the family.

    activations = tokens * (sum of saved bytes over layers that are not recomputed
                            + hidden * item over those that are + head) + positions + casts

    Example: Llama 3 8B (32 layers, hidden 4096, ffn 14336), LoRA r=16 on all linears, bf16 autocast, sdpa:

    norms 32,776 + attention 20,608 + feed-forward 86,016 + inputs 77,824 + adapters 224 = 217,448 B/layer
    head 24,592, less 16,384 for the first norm; rotary positions 512 B each; casts 2.6 MB per layer
    1 x 2048 tokens: 2048 * (32 * 217,448 + 8,208) + 2048 * 512 + 32 * 2,621,440 = 14.35 GB
    """
    if corrections is None:
        corrections = measured_corrections().get(shape.model_type, {}).get(correction_key(plan), {})
    types = item_bytes_of(plan)
    prompt_tokens = virtual_tokens(plan) if plan.method.name == "prompt" else 0
    tokens = batch.num_rows * (batch.num_tokens + prompt_tokens)
    blocks = group_layers(shape)
    layer_coefficients = corrections.get("layer", {})
    costs_by_kind: dict[Any, tuple[LayerActivations, float]] = {}

    def layer_cost(block: Layer) -> tuple[LayerActivations, float]:
        kind = (block.kind, tuple((is_adapted(module, plan), lora_rank(module, plan)) for module in block.modules))
        if kind not in costs_by_kind:
            correction = _linear_correction(layer_coefficients, layer_features(block, shape, batch))
            # autocast keeps a 16-bit copy of every fp32 weight until the pass ends: of A and B, or of the base
            spec, cast_bytes = plan.method.peft, 0.0
            adapted_modules = [m for m in block.modules if is_adapted(m, plan)] if plan.train.autocast else []
            if spec is not None:
                cast_bytes = sum(2.0 * lora_rank(m, plan) * (m.d_in + m.d_out) for m in adapted_modules)
            elif plan.base.dtype == "float32":
                cast_bytes = sum(2.0 * max(1, m.num) * m.d_in * m.d_out for m in adapted_modules)
            costs_by_kind[kind] = (layer_activations(block, shape, plan, batch, correction), cast_bytes)
        return costs_by_kind[kind]

    layers = [layer_cost(block)[0] for block in blocks]
    layer_casts = [layer_cost(block)[1] for block in blocks]
    inputs = shape.dims.hidden * types.hidden
    mode = plan.train.gradient_checkpointing
    recomputed = [mode == "full" or (mode == "selective" and i % 2 == 0) for i in range(len(layers))]
    below = num_untouched_layers(blocks, shape, plan)  # the backward pass ends above these: they save nothing
    layer_casts[:below] = [0.0] * below
    saved_bytes = sum(inputs if recomputed[i] else layer.saved if i >= below else 0.0 for i, layer in enumerate(layers))
    trained = () if plan.method.peft is None else plan.method.peft.arguments.get("modules_to_save", ())
    norms = [t.name for t in shape.tensors if t.role == "norms" and any(matches_target(t.name, n) for n in trained)]
    if norms and shape.family.norm == "RMSNorm":  # a trained one keeps what its weight is multiplied with
        kept = [
            name for name in norms if (place := layer_position(name)) is None or not recomputed[place[1] % len(layers)]
        ]
        saved_bytes += len(kept) * inputs
    is_first_kept = bool(norms) and shape.family.norm != "RMSNorm"
    is_frozen_below = plan.method.peft is not None and prompt_tokens == 0 and not is_first_kept
    if is_frozen_below and below < len(layers) and not recomputed[below]:
        first_norm_bytes = shape.dims.hidden * (4 if shape.family.norm == "RMSNorm" or types.autocast else types.hidden)
        saved_bytes -= first_norm_bytes
    is_full = plan.method.peft is None
    # the last norm, and the head's input
    head_bytes: float = shape.dims.hidden * (4 + types.hidden * (2 if is_full else 1))
    if blocks:
        head_bytes += _linear_correction(corrections.get("above", {}), layer_features(blocks[0], shape, batch))
    head_bytes += 20 if is_full else 16  # token ids, and what a norm keeps per token
    # each layer makes its own of the mask, and what is worked out again needs the one it was made from
    masks = batch.num_rows * batch.num_tokens**2 if batch.is_packed and any(recomputed) else 0
    num_positions = tokens if batch.is_packed else batch.num_tokens  # each pack has positions of its own
    rope = 2 * shape.dims.head_dim * types.hidden if shape.positions == "rope" else 0
    recomputed_bytes = max((layer.saved for i, layer in enumerate(layers) if recomputed[i]), default=0.0)
    cast_bytes = [c + _unpacked_expert_bytes(blocks[i], plan) for i, c in enumerate(layer_casts) if not recomputed[i]]
    unpacked_bytes = max((_unpacked_expert_bytes(b, plan) for i, b in enumerate(blocks) if recomputed[i]), default=0.0)
    return {
        "activations": tokens * (saved_bytes + head_bytes) + num_positions * rope + sum(cast_bytes) + masks,
        "recomputed layer": tokens * recomputed_bytes + unpacked_bytes,
        "temporaries": tokens * max((layer.temporary for layer in layers), default=0.0),
        "casts": sum(c for i, c in enumerate(layer_casts) if recomputed[i] and is_full),
    }
