"""What a forward pass keeps for the backward pass, in closed form: bytes per token, layer by layer. No torch.

The rules follow what autograd saves in transformers' own layers. A product saves its input where its weight
is trained; an activation saves its input; a gate saves both factors; fused attention saves queries, keys,
values, its output and one number per head; RMSNorm saves its input in fp32. They hold for dense decoders;
elsewhere they are a bound (`plan.memory.BOUND`), and the trace tells exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from peftkit.archs import ModelShape, Module
from peftkit.archs.family import Tensor
from peftkit.plan.plan import Batch, Plan
from peftkit.plan.targets import matches

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
# Tensors of the feed-forward's width that an activation saves, where it is not one.
_SAVED_BY_ACTIVATION = {"gelu_new": 4, "gelu_fast": 6, "quick_gelu": 2, "relu2": 2, "bloom gelu": 1}
_SHARED = {"q": "qkv", "k": "qkv", "v": "qkv", "qkv": "qkv", "gate": "mlp", "up": "mlp", "gate_up": "mlp"}


@dataclass(frozen=True)
class Types:
    """Bytes of one number: of the hidden states, of what products return, of trained adapters."""

    hidden: int
    product: int
    adapter: int
    autocast: bool

    @property
    def is_mixed(self) -> bool:
        """Hidden states in fp32, products in 16 bits: each product casts its input for itself."""
        return self.hidden != self.product

    @property
    def copies_inputs(self) -> bool:
        """Whether each adapter casts its input for itself."""
        return self.product != self.adapter or self.is_mixed


def types_of(plan: Plan) -> Types:
    """Which types flow through this plan's model."""
    item = {"float32": 4, "bfloat16": 2, "float16": 2}[plan.base.dtype]
    autocast = plan.train.autocast is not None
    return Types(item, 2 if autocast else item, 4, autocast)


@dataclass
class Layer:
    """The modules and norms of one block. Blocks of one `kind` differ in nothing but their names."""

    modules: list[Module] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    kind: int = 0

    def size(self, *roles: str) -> int:
        """Output width of the first module that plays one of the roles; 0 where none does."""
        return next((m.d_out for m in self.modules if m.role in roles), 0)


def layers_of(shape: ModelShape) -> tuple[Layer, ...]:
    """Blocks in order. Modules outside any block belong to none."""
    return _layers(shape.modules, shape.tensors)


@lru_cache(maxsize=8)
def _layers(modules: tuple[Module, ...], tensors: tuple[Tensor, ...]) -> tuple[Layer, ...]:
    found: dict[str, Layer] = {}
    for module in modules:
        block = _BLOCK.match(f"{module.name}.")
        if block:
            found.setdefault(block[1], Layer()).modules.append(module)
    for tensor in tensors:
        block = _BLOCK.match(f"{tensor.name}.")
        if block and tensor.role in {"norms", "gated norms"}:
            found.setdefault(block[1], Layer()).norms.append(tensor)
    kinds: dict[Any, int] = {}
    for layer in found.values():
        parts = tuple(replace(part, name=part.name.rsplit(".", 1)[-1]) for part in layer.modules)
        norms = tuple((norm.role, norm.num_parameters) for norm in layer.norms)
        layer.kind = kinds.setdefault((parts, norms), len(kinds))
    return tuple(found.values())


@dataclass(frozen=True)
class Kept:
    """Bytes per token that one layer keeps, and what its backward pass takes beside them for a while."""

    saved: float
    passing: float


def _input_bytes(layer: Layer, adapted: Iterable[Module], plan: Plan, types: Types) -> float:
    """Inputs of products whose weights, or whose adapters, are trained."""
    whole = plan.method.peft is None
    total, seen = 0.0, set()
    for module in adapted:
        group = _SHARED.get(module.role, module.role)
        is_attention_output = module.role == "o" and plan.base.attention == "sdpa"
        own_copy = types.is_mixed if whole else types.copies_inputs
        if own_copy and not (whole and is_attention_output):
            total += module.d_in * (types.product if types.autocast else types.adapter)
        elif group not in seen:
            seen.add(group)
            total += 0 if is_attention_output else module.d_in * types.hidden
    return total


def _adapter_bytes(adapted: Iterable[Module], plan: Plan, types: Types) -> float:
    """What adapters save beside their inputs."""
    spec = plan.method.peft
    rank = spec.arguments.get("r", 0) if spec is not None else 0
    item = types.product if types.autocast else types.adapter
    return sum(rank * item for _ in adapted) if spec is not None and "Lora" in spec.class_name else 0.0


def _norm_bytes(layer: Layer, shape: ModelShape, plan: Plan, types: Types) -> float:
    """Norms: their input, and what a trained weight needs of the normed one."""
    rms = shape.family.norm == "RMSNorm"
    total = 0.0
    for tensor in layer.norms:
        width = tensor.num_parameters if rms else tensor.num_parameters // 2
        times = 1
        last = tensor.name.rsplit(".", 1)[-1]
        if last[:2] in {"q_", "k_"} and width == shape.dims.head_dim:  # each head is normed
            times = shape.dims.heads if last[0] == "q" else shape.dims.kv_heads
            width *= times
        total += times * (4 if rms else 8)  # root mean square; or mean and deviation
        if rms:
            total += 4 * width
            trained = plan.method.peft is None or plan.method.name == "ln"
            total += types.hidden * width if trained else 0
        else:
            total += (4 if types.autocast else types.hidden) * width
    return total


def _attention_bytes(layer: Layer, shape: ModelShape, plan: Plan, types: Types, batch: Batch) -> float:
    """Queries, keys, values and output; a mask, where there is one, makes each head's own of the last two."""
    dims = shape.dims
    if not layer.size("q", "qkv"):
        return 0.0
    seen = batch.num_tokens + virtual_tokens(plan)
    if plan.base.attention == "sdpa":
        windowed = shape.num_windowed > 0 and batch.num_tokens >= shape.window
        masked = batch.is_padded or batch.is_packed or windowed or plan.method.name == "prefix"
        keys = dims.q if masked else dims.kv
        ratio = seen / batch.num_tokens
        mask = seen * types.product if masked else 0
        return (2 * dims.q + 2 * keys * ratio) * types.product + 4 * dims.heads + mask
    scores = dims.heads * seen
    kept = scores * 4 + (scores * types.product if types.product != 4 else 0)
    return kept + 3 * dims.q * types.product


def virtual_tokens(plan: Plan) -> int:
    """Tokens that the method puts before the text."""
    spec = plan.method.peft
    return int(spec.arguments.get("num_virtual_tokens", 0)) if spec is not None else 0


def _feed_forward_bytes(layer: Layer, shape: ModelShape, types: Types) -> float:
    width = layer.size("gate", "up") or layer.size("gate_up") // 2
    if not width:
        return 0.0
    saved = _SAVED_BY_ACTIVATION.get(shape.activation, 1)
    gated = 2 if layer.size("gate", "gate_up") else 0
    return (saved + gated) * width * types.product


def layer_bytes(layer: Layer, shape: ModelShape, plan: Plan, batch: Batch, correction: float = 0.0) -> Kept:
    """What one block keeps per token of the batch, with what the family keeps by its own habits."""
    types = types_of(plan)
    adapted = [m for m in layer.modules if is_adapted(m, plan)]
    saved = _norm_bytes(layer, shape, plan, types)
    saved += _attention_bytes(layer, shape, plan, types, batch)
    saved += _feed_forward_bytes(layer, shape, types)
    if plan.method.name == "ia3":
        saved += sum(m.d_in * 4 if m.role == "down" else m.d_out * types.product for m in adapted)
    else:
        saved += _input_bytes(layer, adapted, plan, types) + _adapter_bytes(adapted, plan, types)
    width = layer.size("gate", "up") or layer.size("gate_up") // 2
    passing: float = max(3 * width * types.product, 2 * shape.dims.hidden * 4)
    if plan.base.attention == "eager":
        passing = max(passing, 2.0 * shape.dims.heads * batch.num_tokens * 4)
    return Kept(saved + correction, passing)


def _first_norm_bytes(layer: Layer, shape: ModelShape, types: Types) -> float:
    """Before the first adapter nothing needs a gradient, so the first norm keeps nothing."""
    return shape.dims.hidden * (4 if shape.family.norm == "RMSNorm" or types.autocast else types.hidden)


def is_adapted(module: Module, plan: Plan) -> bool:
    """Whether the method trains something at this module."""
    if plan.method.peft is None:
        return True
    return _is_target(module.name, plan.method.target_modules)


@lru_cache(maxsize=2**16)
def _is_target(name: str, targets: tuple[str, ...]) -> bool:
    return any(matches(name, ending) for ending in targets)


def _casts_bytes(layer: Layer, plan: Plan) -> float:
    """16-bit copies of trained fp32 weights, which autocast's products keep until they are through."""
    if plan.train.autocast is None:
        return 0.0
    spec = plan.method.peft
    adapted = [m for m in layer.modules if is_adapted(m, plan)]
    if spec is None and plan.base.dtype != "float32":
        return 0.0
    if spec is None:
        return sum(2.0 * max(1, m.num) * m.d_in * m.d_out for m in adapted)
    rank = spec.arguments.get("r", 0) if "Lora" in spec.class_name else 0
    return sum(2.0 * rank * (m.d_in + m.d_out) for m in adapted)


def _unpacked_bytes(layer: Layer, plan: Plan) -> float:
    """4-bit experts are unpacked whole for each pass, and the backward pass keeps them."""
    if not plan.base.experts_4bit:
        return 0.0
    item = types_of(plan).hidden
    return sum(item * m.num * m.d_in * m.d_out for m in layer.modules if m.in_experts)


FEATURES = ("hidden", "queries", "keys", "feed-forward", "scores", "tokens", "heads", "one")


def features(layer: Layer, shape: ModelShape, batch: Batch) -> list[float]:
    """The sizes in which a family's own habits are linear, in the order of `FEATURES`."""
    dims = shape.dims
    width = layer.size("gate", "up") or layer.size("gate_up") // 2
    length = batch.num_tokens
    return [dims.hidden, dims.q, dims.kv, width, dims.heads * length, length, dims.heads, 1]


def mode_of(plan: Plan) -> str:
    """Which fitted row holds: the types that flow, and whether the whole model is trained."""
    types = types_of(plan)
    trained = "full" if plan.method.peft is None else "adapter"
    return f"{types.hidden}/{types.product}{' autocast' if types.autocast else ''} {trained}"


def is_fitted(shape: ModelShape, plan: Plan) -> bool:
    """Whether this family was measured in this mode: then the closed form is within a few percent."""
    return mode_of(plan) in measured_corrections().get(shape.model_type, {})


@cache
def measured_corrections() -> Mapping[str, Any]:
    """Bytes per token by family, mode and feature that the rules above do not say."""
    path = resources.files("peftkit.archs") / "data" / "activations.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _correction(found: Mapping[str, float], values: Iterable[float]) -> float:
    return sum(found.get(name, 0.0) * value for name, value in zip(FEATURES, values, strict=True))


def kept_bytes(
    shape: ModelShape, plan: Plan, batch: Batch, *, corrections: Mapping[str, Any] | None = None
) -> Mapping[str, float]:
    """Bytes by kind: `activations` kept until the backward pass, `recomputed layer`, `temporaries` that pass,
    and the `casts` of weights that autocast remembers to the end of the forward pass.

    `corrections` are those measured for the family, unless others are given.
    """
    if corrections is None:
        corrections = measured_corrections().get(shape.model_type, {}).get(mode_of(plan), {})
    types = types_of(plan)
    added = virtual_tokens(plan) if plan.method.name == "prompt" else 0
    tokens = batch.num_rows * (batch.num_tokens + added)
    blocks = layers_of(shape)
    fitted = corrections.get("layer", {})
    known: dict[Any, tuple[Kept, float]] = {}

    def of(block: Layer) -> tuple[Kept, float]:
        alike = (block.kind, tuple(is_adapted(module, plan) for module in block.modules))
        if alike not in known:
            more = _correction(fitted, features(block, shape, batch))
            known[alike] = layer_bytes(block, shape, plan, batch, more), _casts_bytes(block, plan)
        return known[alike]

    layers = [of(block)[0] for block in blocks]
    casts = [of(block)[1] for block in blocks]
    inputs = shape.dims.hidden * types.hidden
    mode = plan.train.gradient_checkpointing
    again = [mode == "full" or (mode == "selective" and i % 2 == 0) for i in range(len(layers))]
    kept = sum(inputs if again[i] else layer.saved for i, layer in enumerate(layers))
    if plan.method.peft is not None and added == 0 and layers and not again[0]:
        kept -= _first_norm_bytes(blocks[0], shape, types)
    whole = plan.method.peft is None
    top: float = shape.dims.hidden * (
        4 + types.hidden * (2 if whole else 1)
    )  # the last norm, and the head's input
    if blocks:
        top += _correction(corrections.get("above", {}), features(blocks[0], shape, batch))
    top += 20 if whole else 16  # token ids, and what a norm keeps per token
    # each layer makes its own of the mask, and what is worked out again needs the one it was made from
    masks = batch.num_rows * batch.num_tokens**2 if batch.is_packed and any(again) else 0
    places = tokens if batch.is_packed else batch.num_tokens  # each pack has positions of its own
    rope = 2 * shape.dims.head_dim * types.hidden if shape.positions == "rope" else 0
    redone = max((layer.saved for i, layer in enumerate(layers) if again[i]), default=0.0)
    lasting = [c + _unpacked_bytes(blocks[i], plan) for i, c in enumerate(casts) if not again[i]]
    unpacked = max((_unpacked_bytes(b, plan) for i, b in enumerate(blocks) if again[i]), default=0.0)
    return {
        "activations": tokens * (kept + top) + places * rope + sum(lasting) + masks,
        "recomputed layer": tokens * redone + unpacked,
        "temporaries": tokens * max((layer.passing for layer in layers), default=0.0),
        "casts": sum(c for i, c in enumerate(casts) if again[i] and whole),
    }
