"""Shapes of a model of an unknown family, inferred from the names and sizes of its layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.archs.family import (
    BlockPart,
    Dims,
    Family,
    Linear,
    ModelShape,
    Module,
    Stack,
    Task,
    TaskHead,
    Tensor,
    Weight,
)
from peftkit.archs.sizes import Config

# (role, what the last part of a name says, what its parent must say), the first match counts
_ROLE_PATTERNS: tuple[tuple[str, str, str], ...] = (
    ("q_a", r"q_a_proj|wq_a", ""),
    ("kv_a", r"kv_a_proj(_with_mqa)?|wkv_a", ""),
    ("kv_b", r"kv_b_proj|wkv_b", ""),
    ("q", r"q_b_proj|wq_b", ""),
    ("qkv", r"(w_?)?qkv(_proj)?|c_attn|query_key_value|in_proj_qkv", ""),
    ("gate_up", r"gate_up(_proj)?|w13", ""),
    ("q", r"q(_proj|_lin)?|query|w_?q", ""),
    ("k", r"k(_proj|_lin)?|key|w_?k", r"(?!.*(ffn|mlp|feed))"),
    ("v", r"v(_proj|_lin)?|value|w_?v", r"(?!.*(ffn|mlp|feed))"),
    ("o", r"o(_proj)?|out(_proj|_lin)?|w_?o|dense|c_proj|output", r"(?=.*(att|ret|mix))"),
    ("router", r"router|gate", r"(?=.*(moe|expert|router))"),
    ("gate", r"gate(_proj)?|w1|wi_0", r"(?=.*(ffn|mlp|feed|dense))"),
    ("up", r"up(_proj)?|w3|wi(_1)?|fc_?1|c_fc|lin1|dense_h_to_4h|key", r"(?=.*(ffn|mlp|feed|dense|layer))"),
    ("down", r"down(_proj)?|w2|wo|fc_?2|c_proj|lin2|dense_4h_to_h|value", r"(?=.*(ffn|mlp|feed|dense|layer))"),
    ("ssm_in", r"in_proj", ""),
)
_INDEXER_REASON = "it only selects what is attended to, and gets no gradient"
_EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "moe_top_k", "top_k_experts"),
    *("num_selected_experts", "num_activated_experts", "n_activated_experts"),
)


@dataclass(frozen=True)
class InspectedLayer:
    """One module or parameter of a model that was built without weights.

    `kind` is "linear", "experts" (a 3-D parameter: num, and two sides), "norm", "embedding" or "other".
    """

    name: str
    kind: str
    num_parameters: int
    d_in: int = 0
    d_out: int = 0
    bias: bool = False
    num: int = 0


def _split_block(name: str) -> tuple[str, str] | None:
    """Split 'model.layers.0.attn.q_proj' into ('model.layers.{i}', 'attn.q_proj'); None outside blocks."""
    match = re.match(r"(.*?\.)\d+\.(.+)", name)
    return (f"{match[1]}{{i}}", match[2]) if match else None


def role_of(layer: InspectedLayer, hidden: int) -> str:
    """Infer the role of a layer from its name, or else from its shape."""
    if layer.kind == "experts":
        return "experts_down" if "down" in layer.name or "w2" in layer.name else "experts_gate_up"
    parent, _, last = layer.name.rpartition(".")
    for role, name_pattern, parent_pattern in _ROLE_PATTERNS:
        if re.fullmatch(name_pattern, last, re.IGNORECASE) and re.match(parent_pattern, parent, re.IGNORECASE):
            return role
    if layer.d_in == hidden and layer.d_out > hidden:
        return "up"
    return "down" if layer.d_out == hidden and layer.d_in > hidden else "other"


def _has_attention(modules: Sequence[Module]) -> bool:
    return any(module.role in {"q", "qkv"} for module in modules)


def infer_dims(
    config: Config, layers: Sequence[InspectedLayer], table: InspectedLayer | None, *, num_layers: int
) -> Dims:
    """Return a model's sizes by the usual keys of a configuration, or else by its layers and token table."""

    def size(*names: str, default: int) -> int:
        value = next((config[name] for name in names if isinstance(config.get(name), int)), default)
        return max(1, int(value))

    width = table.d_out if table else max((layer.d_in for layer in layers), default=1)
    hidden = size("hidden_size", "n_embd", "d_model", "dim", default=width)
    heads = size("num_attention_heads", "n_head", "num_heads", "n_heads", default=1)
    kv_heads = size("num_key_value_heads", default=heads)
    head_dim = size("head_dim", default=max(1, hidden // heads))
    return Dims(
        num_layers=num_layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        q=heads * head_dim,
        kv=kv_heads * head_dim,
        ffn=size("intermediate_size", "n_inner", "d_ff", "ffn_dim", default=4 * hidden),
        vocab=size("vocab_size", default=table.d_in if table else 1),
        head_dim=head_dim,
        positions=int(config.get("max_position_embeddings") or 0),
    )


def infer_shape(
    config: Config, layers: Sequence[InspectedLayer], *, task: Task, embeddings: str, head: str, tied: bool
) -> ModelShape:
    """Build the shape of a model of no known family.

    `embeddings` and `head` are the full names of its token table and of the task's head. What its layers
    attend to cannot be inferred from shapes, so nothing is claimed about caches, packing or prefixes.
    """
    # of a wrapper, whose own sizes are those of other parts, or of an encoder-decoder
    inner: Config = next((config[key] for key in ("text_config", "decoder") if isinstance(config.get(key), dict)), {})
    config = {**config, **inner}
    block_layers = [layer for layer in layers if layer.kind in {"linear", "experts"} and _split_block(layer.name)]
    block_layer_names = {layer.name for layer in block_layers}
    blocks = {re.match(r"(.*?\.\d+)\.", layer.name)[1] for layer in block_layers}  # type: ignore[index]
    table = next((layer for layer in layers if layer.name == embeddings), None)
    dims = infer_dims(config, block_layers, table, num_layers=max(1, len(blocks)))
    modules = tuple(
        Module(
            layer.name,
            role_of(layer, dims.hidden),
            layer.d_in,
            layer.d_out,
            layer.bias,
            num=layer.num,
            blocked_reason=_INDEXER_REASON if ".indexer." in layer.name else "",
        )
        for layer in block_layers
    )
    per_token = [config[name] for name in _EXPERTS_PER_TOKEN if isinstance(config.get(name), int)]
    has_experts = any(layer.num for layer in block_layers)
    linears = {
        _split_block(m.name)[1]: Linear(_split_block(m.name)[1], m.role, str(m.d_in), str(m.d_out))  # type: ignore[index]
        for m in modules
    }
    block_paths = list(dict.fromkeys(_split_block(m.name)[0] for m in modules))  # type: ignore[index]
    layers = [layer for layer in layers if layer.name not in block_layer_names]
    tables = {embeddings: "embeddings", head: "head"}
    roles = {"norm": "norms", "embedding": "positions"}
    tensors = [
        Tensor(layer.name, tables.get(layer.name, roles.get(layer.kind, "states")), layer.num_parameters)
        for layer in layers
    ]
    is_language_model = task in {"causal-lm", "seq2seq"}
    task_head = (
        TaskHead((), ()) if is_language_model else TaskHead((Weight(head, "0", "head"),), (head.rsplit(".", 1)[-1],))
    )
    family = Family(
        name=f"{config.get('model_type')} (inferred)",
        model_types=(str(config.get("model_type")),),
        stacks=tuple(Stack(block_path, (BlockPart(tuple(linears.values())),)) for block_path in block_paths),
        heads={task: task_head},
        embeddings=embeddings.rsplit(".", 1)[-1],
        head=head.rsplit(".", 1)[-1],
        positions="unknown" if _has_attention(modules) else "none",
        refuses={"prefix": "no known family: its cache of keys and values cannot be inferred from shapes"},
        packs=False,
        mind=(
            "no known family: roles of its layers are inferred from their names and shapes",
            *([] if per_token or not has_experts else ["how many experts a token goes through is not known"]),
        ),
        inferred=True,
    )
    return ModelShape(
        family=family,
        model_type=str(config.get("model_type")),
        task=task,
        dims=dims,
        modules=modules,
        tensors=tuple(tensors),
        tied_embeddings=tied,
        positions="unknown" if _has_attention(modules) else "none",
        rope_type="default",
        experts_per_token=per_token[0] if per_token else 0,
        cache_per_token=0,
        num_windowed=0,
        window=0,
        state_per_sequence=0,
        num_cached_layers=0,
        activation=str(config.get("hidden_act") or "unknown"),
        source="the model, built without weights",
    )
