"""From config.json to shapes, in closed form: no torch, no weights, no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.archs.families import FAMILIES
from peftkit.archs.family import Dims, Family, Linear, ModelShape, Module

Config = Mapping[str, Any]
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
_USUAL_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "positions": "max_position_embeddings",
}
_BIAS_DEFAULTS = {"gpt_neox": {"attention_bias": True}}


def family_of(model_type: str) -> Family | None:
    """The family that knows this `model_type`, or None."""
    return _BY_TYPE.get(model_type)


def _dims(config: Config, family: Family) -> Dims:
    def size(name: str) -> int | None:
        value = config.get(family.config_keys.get(name, _USUAL_KEYS[name]))
        return None if value is None else int(value)

    hidden, heads, num_layers = size("hidden"), size("heads"), size("num_layers")
    if hidden is None or heads is None or num_layers is None:
        raise KeyError(f"config.json of a {family.name} model without hidden size, heads or layers")
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = size("kv_heads") or heads
    return Dims(
        num_layers=num_layers,
        hidden=hidden,
        q=heads * head_dim,
        kv=kv_heads * head_dim,
        ffn=size("ffn") or 4 * hidden,
        vocab=int(config["vocab_size"]),
        head_dim=head_dim,
        positions=size("positions") or 0,
    )


def _has_bias(linear: Linear, config: Config) -> bool:
    if isinstance(linear.bias, bool):
        return linear.bias
    default = _BIAS_DEFAULTS.get(str(config["model_type"]), {}).get(linear.bias, False)
    return bool(config.get(linear.bias, default))


def _num_outside_linears(family: Family, dims: Dims, *, tied: bool) -> int:
    """Embeddings, head and norms."""
    norm = dims.hidden * (2 if family.norm_bias else 1)
    total = dims.vocab * dims.hidden
    if not tied:
        total += dims.vocab * dims.hidden + (dims.vocab if family.head_bias else 0)
    if family.learned_positions:
        total += dims.positions * dims.hidden
    per_block = len(family.norms) * norm + (2 * dims.head_dim if family.qk_norm else 0)
    return total + dims.num_layers * per_block + norm


def shape_from_config(config: Config, *, source: str = "config.json") -> ModelShape | None:
    """Shapes of a model of a known family; None where the family has no entry.

    Raises KeyError where the configuration lacks a size that the family needs.
    """
    family = family_of(str(config.get("model_type", "")))
    if family is None:
        return None
    dims = _dims(config, family)
    tied = bool(config.get("tie_word_embeddings", family.tied_by_default))
    modules = tuple(
        Module(
            f"{family.block.format(i=i)}.{linear.name}",
            linear.role,
            dims.width(linear.d_in),
            dims.width(linear.d_out),
            _has_bias(linear, config),
        )
        for i in range(dims.num_layers)
        for linear in family.linears
    )
    total = sum(module.num_parameters for module in modules) + _num_outside_linears(family, dims, tied=tied)
    return ModelShape(
        family=family.name,
        model_type=str(config["model_type"]),
        dims=dims,
        modules=modules,
        num_parameters=total,
        tied_embeddings=tied,
        source=source,
    )
