"""Model shapes from config.json in closed form: no torch, no weights, no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftkit.archs.families import FAMILIES
from peftkit.archs.family import TASKS, BlockPart, Dims, Family, ModelShape, Module, Task, Tensor
from peftkit.archs.sizes import Config, Sizes

_FAMILY_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(model_type: str) -> Family | None:
    """Return the family that lists this `model_type`, or None."""
    return _FAMILY_BY_MODEL_TYPE.get(model_type)


def task_of(family: Family, task_name: str) -> Task | None:
    """Return the task to train: the named one, for auto the family's first; None without such a head."""
    if task_name == "auto":
        return next(iter(family.heads))
    return next((task for task in TASKS if task == task_name and family.task_head(task) is not None), None)


_MAX_LAYERS = 10_000


def _blocks(family: Family, sizes: Sizes) -> Iterable[tuple[str, BlockPart]]:
    """Yield (block path, part) for every layer of every stack. Raises ValueError for unknown layer kinds."""
    for stack in family.stacks:
        num_layers = sizes[stack.layers]
        kinds = stack.kinds(sizes) if stack.kinds else [frozenset[str]()] * num_layers
        if len(kinds) != num_layers:
            raise ValueError(f"{num_layers} layers, but the kinds of {len(kinds)}")
        unknown_kinds = frozenset[str]().union(*kinds) - {part.kind for part in stack.parts}
        if unknown_kinds:
            raise ValueError(f"layers of the unknown kind {sorted(unknown_kinds)[0]!r}")
        for i in range(num_layers):
            for part in stack.parts:
                if not part.kind or part.kind in kinds[i]:
                    yield stack.block.format(i=i), part


def _rope_type(config: Config) -> str:
    """Return how the base already scales its rotary positions; older files use the key rope_scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters is {rope!r:.60}, which is no mapping")
    rope_sets = [value for value in rope.values() if isinstance(value, Mapping)] or [rope]
    types = {str(rope_set.get("rope_type") or rope_set.get("type") or "default") for rope_set in rope_sets} - {
        "default"
    }
    return sorted(types)[0] if types else "default"


def _sliding_window(family: Family, sizes: Sizes, num_cached: int) -> tuple[int, int]:
    """Return (layers with a sliding window, its tokens): as listed, else every layer but each n-th."""
    if family.window is None or sizes.key("sliding_window") is None:
        return 0, 0
    layer_types = sizes.names("layer_types")
    if layer_types:
        return layer_types.count("sliding_attention"), sizes["sliding_window"]
    num_full = num_cached // family.window if family.window else 0
    return num_cached - num_full, sizes["sliding_window"]


def shape_of(family: Family, config: Config, *, task: str = "auto", source: str = "config.json") -> ModelShape:
    """Compute the shapes of a model of a family.

    `config` may hold `num_labels` (default 2), which classification heads depend on. Raises KeyError if the
    configuration lacks a size, ValueError if one is absurd or the family has no head for the task.
    """
    resolved_task = task_of(family, task)
    head = family.task_head(resolved_task) if resolved_task else None
    if resolved_task is None or head is None:
        raise ValueError(f"{family.name} has no {task} head: it has {', '.join(family.heads)}")
    sizes = Sizes(config, family.sizes, {"num_labels": 2, **family.defaults})
    names = ("hidden", "heads", "kv_heads", "q", "kv", "ffn", "vocab", "head_dim", "positions")
    named_sizes = {name: sizes[name] for name in names}
    layers = sizes["layers"]
    for name, value in {**named_sizes, "layers": layers}.items():
        if value < 1 and name != "positions":
            raise ValueError(f"{name} is {value}")
    if layers > _MAX_LAYERS:
        raise ValueError(f"{layers} layers")
    if named_sizes["heads"] % named_sizes["kv_heads"]:
        raise ValueError(f"{named_sizes['heads']} heads for {named_sizes['kv_heads']} of keys and values")
    has_own_head_dim = "head_dim" in family.sizes or sizes.key("head_dim") is not None
    if not has_own_head_dim and named_sizes["hidden"] % named_sizes["heads"]:
        raise ValueError(f"{named_sizes['heads']} heads do not divide the hidden size {named_sizes['hidden']}")
    dims = Dims(num_layers=layers, **named_sizes)
    is_language_model = resolved_task in {"causal-lm", "seq2seq"}
    tie_setting = sizes.key("tie_word_embeddings")
    tied = is_language_model and (family.tied_by_default if tie_setting is None else sizes.flag("tie_word_embeddings"))
    modules: list[Module] = []
    # embeddings, and the head that the task puts on top
    vocab = sizes["vocab*hidden"]
    tensors = [Tensor(family.embeddings, "embeddings", vocab)]
    if resolved_task in {"causal-lm", "seq2seq"}:
        if not tied:
            tensors.append(Tensor(family.head, "head", vocab + (sizes["vocab"] if family.head_bias else 0)))
        elif family.head_bias:
            tensors.append(Tensor(family.head, "head", sizes["vocab"]))
    tensors += [Tensor(w.name, w.role, sizes[w.size]) for w in head.weights]
    cache = state = num_cached = 0
    for block, part in _blocks(family, sizes):
        modules += [
            Module(
                name=f"{block}.{linear.name}",
                role=linear.role,
                d_in=sizes[linear.d_in],
                d_out=sizes[linear.d_out],
                bias=(linear.bias if isinstance(linear.bias, bool) else sizes.flag(linear.bias)),
                num=sizes[linear.num] if linear.num else 0,
                blocked_reason=linear.blocked_reason,
                by_parameter=linear.by_parameter,
            )
            for linear in part.linears
        ]
        tensors += [Tensor(f"{block}.{w.name}", w.role, sizes[w.size]) for w in part.weights]
        cache += sizes[part.cache] if part.cache else 0
        state += sizes[part.state] if part.state else 0
        num_cached += bool(part.cache)
    tensors += [Tensor(w.name, w.role, sizes[w.size]) for w in family.outside]
    num_windowed, window = _sliding_window(family, sizes, num_cached)
    key, default = family.activation
    return ModelShape(
        family=family,
        model_type=str(config["model_type"]),
        task=resolved_task,
        dims=dims,
        modules=tuple(modules),
        tensors=tuple(tensors),
        tied_embeddings=tied,
        positions=family.positions(sizes) if callable(family.positions) else family.positions,
        rope_type=_rope_type(config),
        experts_per_token=(sizes["experts_per_token"] if family.has_experts else 0),
        cache_per_token=cache,
        num_windowed=num_windowed,
        window=window,
        state_per_sequence=state,
        num_cached_layers=num_cached,
        activation=str(sizes.key(key) or default) if key else default,
        source=source,
        unread_keys=sizes.unread(),
    )


def shape_from_config(
    config: Mapping[str, object], *, task: str = "auto", source: str = "config.json"
) -> ModelShape | None:
    """Compute the shapes of a model; None if no family lists its type. Raises as `shape_of`."""
    family = family_of(str(config.get("model_type", "")))
    return None if family is None else shape_of(family, config, task=task, source=source)
