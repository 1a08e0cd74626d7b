"""Function-preserving growth of a LoRA adapter: a checkpoint of the old one becomes one of the new.

W + s B A = W + s' B' A' with A' = [A; new rows] and B' = [c B | 0], c = s / s', as in Net2Net (Chen et al.
2016). The new adapter is attached to the base by PEFT from the new plan. Load the base again for it: PEFT's
`unload` leaves trained tables in it, and an adapter of one parameter of fused experts leaves the parameters
in another order, by which PEFT would name a second one's adapter so that only this base loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer

from peftkit.errors import PeftkitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]
NamedTensors = Mapping[str, torch.Tensor]
_StateFields = dict[str, Any]  # of one tensor's state: exp_avg, step, ...
_FIRST_MOMENTS = {"exp_avg", "state1"}  # torch's names, bitsandbytes' names
_SECOND_MOMENTS = {"exp_avg_sq", "max_exp_avg_sq", "state2"}
_MAX_RELATIVE_EFFECT = 1e-4  # |BA| over |B||A|: 5e-8 in orthogonal starts, about 1 over sqrt(rank) in PiSSA's


@dataclass(frozen=True)
class AdaptedWeight:
    """An adapted weight by its name in the base, with s of W + s B A. Fused experts have `rank` rows each."""

    weight: str
    rank: int
    scale: float


AdaptedWeights = Mapping[str, AdaptedWeight]  # by the adapting module's name in the PeftModel


@dataclass(frozen=True)
class GrownCheckpoint:
    """A checkpoint of the grown adapter, in the new model's order.

    `trained` has exactly the trainable names; unchanged tensors are not copied. `optimizer` is keyed
    "tensor|field". `restarted` are tensors whose optimizer state could not be carried over (8-bit blocks,
    factored moments): the optimizer creates it anew.
    """

    trained: Tensors
    optimizer: dict[str, Any]
    restarted: tuple[str, ...]


def adapted_weights(model: PreTrainedModel) -> dict[str, AdaptedWeight]:
    """Return the adapted weights of a PeftModel by module.

    Raises PeftkitError unless it is one unmerged LoRA.
    """
    kinds = [str(config.peft_type.value) for config in model.peft_config.values()]
    if kinds != ["LORA"]:
        raise PeftkitError(f"only a model with one LoRA adapter can grow: this one has {', '.join(kinds)}")
    (adapter,) = model.peft_config
    weights_by_module = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.scaling:
            continue
        if module.merged:
            raise PeftkitError(f"{name} is merged: only an unmerged adapter can grow")
        # a wrapper of a parameter may wrap another one: which is outside is not for us to rely on
        base_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(module, "parameter_name", None)
        weight = f"{base_name}.{parameter}" if parameter else base_name
        weights_by_module[name] = AdaptedWeight(weight, int(module.r[adapter]), float(module.scaling[adapter]))
    return weights_by_module


@dataclass(frozen=True)
class _Origin:
    """The source of a tensor of the new adapter."""

    source: str | None  # its old name
    side: str = ""  # "A" | "B"; "" for what is carried over as it is
    factor: float = 1.0  # B' = factor B
    num_experts: int = 1
    same: bool = True  # neither wider nor rescaled


_Origins = Mapping[str, _Origin]  # by the new name


def grow_adapter(
    trained: NamedTensors,
    optimizer: Mapping[str, object],
    initial: NamedTensors,
    *,
    old: AdaptedWeights,
    new: AdaptedWeights,
    directions: NamedTensors | None = None,
) -> GrownCheckpoint:
    """Return the checkpoint of the new adapter that computes the same function as the old one.

    Args:
        trained, optimizer: the old checkpoint's, `optimizer` with tensors and plain values alike.
        initial: the trainable tensors of the new model at initialisation.
        old, new: the `adapted_weights` of both models.
        directions: (k, d_in), or (num_experts, k, d_in), by the weight's name in the base: new rows of A,
            or the first rows of a new module's A. Those beyond the free rows are dropped; PEFT's own fill
            the rest.

    All new rows get the mean norm of the old ones. Raises PeftkitError where the new adapter cannot hold the
    old one, or its B A is not zero at initialisation.
    """
    states: dict[str, _StateFields] = {}
    for key, value in optimizer.items():
        name, _, field = key.rpartition("|")
        states.setdefault(name, {})[field] = value
    origins = _tensor_origins(trained, initial, old, new)
    # raise PeftkitError with the first five reasons why the adapter cannot grow
    sources = {origin.source: name for name, origin in origins.items() if origin.source is not None}
    new_weights = {adapted.weight: adapted for adapted in new.values()}
    removed = [adapted.weight for adapted in old.values() if adapted.weight not in new_weights]
    problems = [f"{weight} is no longer adapted" for weight in removed]
    for weight, rank in (
        (adapted_weight.weight, adapted_weight.rank)
        for adapted_weight in old.values()
        if adapted_weight.weight in new_weights
    ):
        if new_weights[weight].rank < rank:
            problems.append(f"{weight}: rank {new_weights[weight].rank} is below {rank}")
    problems += [f"the new adapter does not train {name}" for name in trained if name not in sources]
    problems += [f"the checkpoint has no {name}" for name in sources if name not in trained]
    problems += [f"{name} has an optimizer state, but is not trained" for name in states if name not in trained]
    if not problems:
        problems = [
            f"{source}: {tuple(trained[source].shape)} does not fit into {tuple(initial[name].shape)}"
            for source, name in sources.items()
            if not _fits_into(trained[source], initial[name], origins[name].side)
        ]
    if problems:
        raise PeftkitError(f"the adapter cannot grow: {'; '.join(problems[:5])}")
    factors = _grow_factors(trained, initial, origins, new, directions or {})
    tensors: Tensors = {}
    state: dict[str, Any] = {}
    restarted = []
    for name, initial_tensor in initial.items():
        origin = origins[name]
        source_tensor = (initial_tensor if origin.source is None else trained[origin.source]).detach()
        # not in `factors`: what is kept, and the bias of a B, which s multiplies too
        scaled_tensor = source_tensor if origin.factor == 1.0 else source_tensor * origin.factor
        tensors[name] = factors.get(name, scaled_tensor)
        old_state = states.get(origin.source or "", {})
        new_state = _grow_adam_state(old_state, source_tensor, tensors[name].shape, origin)
        state.update({f"{name}|{field}": value for field, value in new_state.items()})
        if old_state and not new_state:
            restarted.append(name)
    return GrownCheckpoint(tensors, state, tuple(restarted))


def _split_name(name: str) -> tuple[str, str, str]:
    """Split a tensor's name into adapting module, rest, and "A" or "B" for the factors ("" for others)."""
    module, _, piece = name.rpartition(".lora_")
    side = piece.removeprefix("embedding_")[:2]
    return module, piece, side[0] if side in {"A.", "B."} else ""


def _tensor_origins(
    trained: NamedTensors, initial: NamedTensors, old: AdaptedWeights, new: AdaptedWeights
) -> dict[str, _Origin]:
    """Return the origin of each trainable tensor of the new adapter."""
    old_modules = {adapted.weight: module for module, adapted in old.items()}
    origins = {}
    for name, tensor in initial.items():
        module, piece, side = _split_name(name)
        if module not in new:
            origins[name] = _Origin(name if name in trained else None)
        elif new[module].weight not in old_modules:
            origins[name] = _Origin(None, side)
        else:
            old_module = old_modules[new[module].weight]
            old_weight, new_weight = old[old_module], new[module]
            factor = old_weight.scale / new_weight.scale if side == "B" else 1.0
            unchanged = old_weight.rank == new_weight.rank and factor == 1.0
            # A (num_experts x rank, d_in) is stacked by expert
            num_experts = tensor.shape[0] // new_weight.rank if side == "A" else 1
            origins[name] = _Origin(f"{old_module}.lora_{piece}", side, factor, num_experts, unchanged)
    return origins


def _fits_into(old: torch.Tensor, new: torch.Tensor, side: str) -> bool:
    """Return whether a tensor fits into a new one; factors may grow along the rank.

    That is axis 0 of A (rank, d_in) and axis 1 of B (d_out, rank).
    """
    rank_axis = {"A": 0, "B": 1}.get(side)
    sizes = enumerate(zip(old.shape, new.shape, strict=False))
    return old.ndim == new.ndim and all(m == n or (axis == rank_axis and m < n) for axis, (m, n) in sizes)


def _grow_factors(
    trained: NamedTensors, initial: NamedTensors, origins: _Origins, new: AdaptedWeights, directions: NamedTensors
) -> Tensors:
    """Return A' and B' of every adapted weight, by name.

    Raises PeftkitError for directions of other weights.
    """
    if unknown := sorted(set(directions) - {adapted.weight for adapted in new.values()}):
        raise PeftkitError(f"directions for {unknown[0]}, which the new adapter does not adapt")
    pairs: dict[str, dict[str, str]] = {}
    for name in initial:
        module, piece, side = _split_name(name)
        if side and module in new and not piece.endswith(".bias"):
            pairs.setdefault(module, {})[side] = name
    factors: Tensors = {}
    for module, pair in pairs.items():
        a_name, b_name = pair["A"], pair["B"]
        source, initial_pair, old_pair = (
            origins[a_name].source,
            (initial[a_name].detach(), initial[b_name].detach()),
            None,
        )
        if source is not None:
            old_pair = (
                trained[source].detach(),
                trained[str(origins[b_name].source)].detach() * origins[b_name].factor,
            )
        factors[a_name], factors[b_name] = _grow_pair(
            old_pair, initial_pair, new[module], directions.get(new[module].weight)
        )
    return factors


_Pair = tuple[torch.Tensor, torch.Tensor]  # A (num_experts x rank, d_in), B (d_out, rank x num_experts)


def _grow_pair(
    old_pair: _Pair | None, initial: _Pair, adapted: AdaptedWeight, directions: torch.Tensor | None
) -> _Pair:
    """Return A' and B' of one weight from the old pair (B already scaled) and PEFT's initial pair.

    PEFT stacks A by expert and B by rank: expert e has the rows [e rank, (e + 1) rank) of A and every
    num_experts-th column of B, so that new columns of B are its last ones.
    A (1, d_in), B (d_out, 1), rank 1 -> 3, two directions d1, d2, all |d| = |A[0]|:
    A' = [A[0]; d1; d2]  (3, d_in)
    B' = [B[:, 0] | 0 | 0]  (d_out, 3), so B' A' = B A
    Where A starts at zero (embeddings), the new columns of B are PEFT's instead, at the mean norm of the old
    ones.
    """
    num_experts = initial[0].shape[0] // adapted.rank
    if initial[0].any() and initial[1].any():
        a = _by_expert(initial[0], num_experts).double()
        b = initial[1].double().view(initial[1].shape[0], -1, num_experts)
        inner, outer = torch.einsum("eri,eqi->erq", a, a), torch.einsum("ore,oqe->erq", b, b)
        effect = float((inner * outer).sum().clamp(min=0).sqrt())  # Frobenius norm of all B A
        if effect > _MAX_RELATIVE_EFFECT * float(a.norm() * b.norm()):
            raise PeftkitError(
                f"{adapted.weight}: B A of the new adapter is not zero at initialisation; attach it with the "
                "default LoRA initialisation"
            )
    if old_pair is None:
        if directions is None:
            return initial
        if initial[1].any():
            raise PeftkitError(f"{adapted.weight}: B does not start at zero, so A takes no directions")
        old_pair = initial[0][:0], initial[1][:, :0]
    old_rank = old_pair[0].shape[0] // num_experts
    template = old_pair[0] if old_rank else initial[0]
    mean_norm = _by_expert(template, num_experts).norm(dim=-1).mean(dim=1, keepdim=True)
    a = _with_norm(_by_expert(initial[0].to(template), num_experts), mean_norm)
    if directions is not None:
        # A is (num_experts, rank, d_in): the directions follow its `old_rank` rows
        given = directions.to(template)
        given = given.unsqueeze(0).expand(a.shape[0], -1, -1) if given.ndim == 2 else given
        if given.ndim != 3 or given.shape[::2] != a.shape[::2] or not bool(given.isfinite().all()):
            raise PeftkitError(f"{adapted.weight}: directions must be finite rows of {a.shape[2]} numbers")
        new_rows = _with_norm(given, mean_norm)[:, : a.shape[1] - old_rank]
        a[:, old_rank : old_rank + new_rows.shape[1]] = new_rows
    b = initial[1].to(old_pair[1])
    if a[:, old_rank:].any():
        b = torch.zeros_like(b)
    else:  # adapters of embeddings start at A = 0
        b = _with_norm(b.T.unsqueeze(0), old_pair[1].norm(dim=0).mean().view(1, 1))[0].T.contiguous()
    a[:, :old_rank] = _by_expert(old_pair[0], num_experts)
    b[:, : old_pair[1].shape[1]] = old_pair[1]
    columns = b.view(b.shape[0], adapted.rank, num_experts).permute(2, 1, 0)
    if not bool((a.any(dim=-1) | columns.any(dim=-1))[:, old_rank:].all()):
        raise PeftkitError(f"{adapted.weight}: new rows of A and columns of B are both zero, and would stay zero")
    return a.view(initial[0].shape), b


def _by_expert(a: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return A (num_experts x rank, d_in) as (num_experts, rank, d_in)."""
    return a.reshape(num_experts, -1, a.shape[1])


def _with_norm(rows: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Scale rows (num_experts, n, d) to the norm (num_experts, 1).

    Zero rows, or a zero norm, leave them unchanged.
    """
    row_norms = rows.norm(dim=-1)
    scale = torch.where((row_norms > 0) & (norm > 0), norm / row_norms, 1.0)
    return rows * scale.unsqueeze(-1)


def _grow_adam_state(fields: _StateFields, old: torch.Tensor, shape: torch.Size, origin: _Origin) -> _StateFields:
    """Return Adam's state of a grown tensor; empty where the optimizer must create it anew.

    theta' = c theta has the gradient g / c. New entries get a zero first moment and the mean of the second
    moments: `step` counts for the whole tensor, so that zeros there would make the first updates far too
    long.
    """
    if origin.same:
        return dict(fields)
    moments = {key: value for key, value in fields.items() if key in _FIRST_MOMENTS | _SECOND_MOMENTS}
    is_elementwise = all(
        value_tensor.shape == old.shape and value_tensor.is_floating_point() for value_tensor in moments.values()
    )
    if not is_elementwise or set(fields) - set(moments) - {"step"}:
        return {}
    new_fields = dict(fields)
    for key, moment in moments.items():
        scaled = moment / (origin.factor if key in _FIRST_MOMENTS else origin.factor**2)
        padded = scaled.new_full(shape, 0.0 if key in _FIRST_MOMENTS else float(scaled.double().mean()))
        if origin.side == "A":
            new_rows, old_rows = (_by_expert(padded, origin.num_experts), _by_expert(scaled, origin.num_experts))
            new_rows[:, : old_rows.shape[1]] = old_rows
        else:
            padded[tuple(slice(size) for size in scaled.shape)] = scaled
        new_fields[key] = padded
    return new_fields
