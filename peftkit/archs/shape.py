"""From config.json to shapes, in closed form: no torch, no weights, no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftkit.archs.families import FAMILIES
from peftkit.archs.family import Dims, Family, Linear, ModelShape, Module, Part, Task, Tensor
from peftkit.archs.sizes import Config, Sizes

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(model_type: str) -> Family | None:
    """The family that knows this `model_type`, or None."""
    return _BY_TYPE.get(model_type)


def task_of(family: Family, wanted: str) -> Task | None:
    """The task to train: as wanted, or the family's own first one; None where the family has no such head."""
    if wanted == "auto":
        return next(iter(family.heads))
    return next((task for task in family.heads if task == wanted), None)


_MOST_LAYERS = 10_000


def _dims(sizes: Sizes, family: Family) -> Dims:
    names = ("hidden", "heads", "kv_heads", "q", "kv", "ffn", "vocab", "head_dim", "positions")
    found = {name: sizes[name] for name in names}
    layers = sizes["layers"]
    for name, value in {**found, "layers": layers}.items():
        if value < 1 and name != "positions":
            raise ValueError(f"{name} is {value}")
    if layers > _MOST_LAYERS:
        raise ValueError(f"{layers} layers")
    if found["heads"] % found["kv_heads"]:
        raise ValueError(f"{found['heads']} heads for {found['kv_heads']} of keys and values")
    own = "head_dim" in family.sizes or sizes.key("head_dim") is not None
    if not own and found["hidden"] % found["heads"]:
        raise ValueError(f"{found['heads']} heads do not divide the width {found['hidden']}")
    return Dims(num_layers=layers, **found)


def _has_bias(linear: Linear, sizes: Sizes) -> bool:
    return linear.bias if isinstance(linear.bias, bool) else sizes.flag(linear.bias)


def _module(linear: Linear, block: str, sizes: Sizes) -> Module:
    return Module(
        name=f"{block}.{linear.name}",
        role=linear.role,
        d_in=sizes[linear.d_in],
        d_out=sizes[linear.d_out],
        bias=_has_bias(linear, sizes),
        num=sizes[linear.num] if linear.num else 0,
        blocked=linear.blocked,
        by_parameter=linear.by_parameter,
    )


def _blocks(family: Family, sizes: Sizes) -> Iterable[tuple[str, Part]]:
    """(block path, part) for every layer of every stack."""
    for stack in family.stacks:
        num_layers = sizes[stack.layers]
        kinds = stack.kinds(sizes) if stack.kinds else [frozenset[str]()] * num_layers
        if len(kinds) != num_layers:
            raise ValueError(f"{num_layers} layers, but the kinds of {len(kinds)}")
        odd = frozenset[str]().union(*kinds) - {part.kind for part in stack.parts}
        if odd:
            raise ValueError(f"layers of the unknown kind {sorted(odd)[0]!r}")
        for i in range(num_layers):
            for part in stack.parts:
                if not part.kind or part.kind in kinds[i]:
                    yield stack.block.format(i=i), part


def _tables(family: Family, task: Task, sizes: Sizes, *, tied: bool) -> list[Tensor]:
    """Embeddings, and the head that the task puts on top."""
    vocab = sizes["vocab*hidden"]
    found = [Tensor(family.embeddings, "embeddings", vocab)]
    if task in {"causal-lm", "seq2seq"}:
        if not tied:
            found.append(Tensor(family.head, "head", vocab + (sizes["vocab"] if family.head_bias else 0)))
        elif family.head_bias:
            found.append(Tensor(family.head, "head", sizes["vocab"]))
    found += [Tensor(w.name, w.role, sizes[w.size]) for w in family.heads[task].weights]
    return found


def _rope_type(config: Config) -> str:
    """How the base stretches its rotary positions itself; older files say rope_scaling."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"rope_parameters is {found!r:.60}, which is no mapping")
    sets = [value for value in found.values() if isinstance(value, Mapping)] or [found]
    types = {str(one.get("rope_type") or one.get("type") or "default") for one in sets} - {"default"}
    return sorted(types)[0] if types else "default"


def _experts_per_token(family: Family, sizes: Sizes) -> int:
    return sizes["experts_per_token"] if family.has_experts else 0


def _windows(family: Family, sizes: Sizes, num_cached: int) -> tuple[int, int]:
    """(layers with a sliding window, its tokens): as listed, else every layer but each n-th."""
    if family.window is None or sizes.key("sliding_window") is None:
        return 0, 0
    listed = sizes.names("layer_types")
    if listed:
        return listed.count("sliding_attention"), sizes["sliding_window"]
    full = num_cached // family.window if family.window else 0
    return num_cached - full, sizes["sliding_window"]


def shape_of(
    family: Family, config: Config, *, task: str = "auto", source: str = "config.json"
) -> ModelShape:
    """Shapes of a model of a family.

    `config` may hold `num_labels` (2 where it does not), which classification heads depend on.
    Raises KeyError where the configuration lacks a size, ValueError where one is absurd or the family has no
    head for the task.
    """
    chosen = task_of(family, task)
    if chosen is None:
        raise ValueError(f"{family.name} has no {task} head: it has {', '.join(family.heads)}")
    sizes = Sizes(config, family.sizes, {"num_labels": 2, **family.defaults})
    dims = _dims(sizes, family)
    lm = chosen in {"causal-lm", "seq2seq"}
    tie = sizes.key("tie_word_embeddings")
    tied = lm and (family.tied_by_default if tie is None else sizes.flag("tie_word_embeddings"))
    modules: list[Module] = []
    tensors = _tables(family, chosen, sizes, tied=tied)
    cache = state = num_cached = 0
    for block, part in _blocks(family, sizes):
        modules += [_module(linear, block, sizes) for linear in part.linears]
        tensors += [Tensor(f"{block}.{w.name}", w.role, sizes[w.size]) for w in part.weights]
        cache += sizes[part.cache] if part.cache else 0
        state += sizes[part.state] if part.state else 0
        num_cached += bool(part.cache)
    tensors += [Tensor(w.name, w.role, sizes[w.size]) for w in family.outside]
    windowed, window = _windows(family, sizes, num_cached)
    key, default = family.activation
    return ModelShape(
        family=family,
        model_type=str(config["model_type"]),
        task=chosen,
        dims=dims,
        modules=tuple(modules),
        tensors=tuple(tensors),
        tied_embeddings=tied,
        positions=family.positions(sizes) if callable(family.positions) else family.positions,
        rope_type=_rope_type(config),
        experts_per_token=_experts_per_token(family, sizes),
        cache_per_token=cache,
        num_windowed=windowed,
        window=window,
        state_per_sequence=state,
        num_cached_layers=num_cached,
        activation=str(sizes.key(key) or default) if key else default,
        source=source,
    )


def shape_from_config(
    config: Mapping[str, object], *, task: str = "auto", source: str = "config.json"
) -> ModelShape | None:
    """Shapes of a model of a known family; None where the family has no entry. Raises as `shape_of`."""
    family = family_of(str(config.get("model_type", "")))
    return None if family is None else shape_of(family, config, task=task, source=source)
