"""Growing an adapter without changing its function: a checkpoint of the old one becomes one of the new.

W + s B A = W + s' B' A' with A' = [A; new rows] and B' = [c B | 0], c = s / s': function-preserving as in
Net2Net (Chen et al. 2016). The new adapter is PEFT's own, attached by the new plan to the base, best loaded
anew: PEFT's `unload` leaves trained tables in it, and an adapter of one parameter of fused experts leaves the
parameters in another order, by which PEFT would name a second one's adapter so that only this base loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.errors import PeftkitError

Tensors = dict[str, torch.Tensor]
Named = Mapping[str, torch.Tensor]
_Fields = dict[str, Any]  # of one tensor's state: exp_avg, step, ...
_FIRST = {"exp_avg", "state1"}  # torch's names, bitsandbytes' names
_SECOND = {"exp_avg_sq", "max_exp_avg_sq", "state2"}
_NO_EFFECT = 1e-4  # |BA| over |B||A|: 5e-8 in orthogonal starts, about 1 over sqrt(rank) in PiSSA's


@dataclass(frozen=True)
class Adapted:
    """An adapted weight, as the base names it, with s of W + s B A. Fused experts have `rank` rows each."""

    weight: str
    rank: int
    scale: float


Scales = Mapping[str, Adapted]  # by the adapting module's name in the PeftModel


@dataclass(frozen=True)
class Grown:
    """What a checkpoint of the grown adapter holds, in the new model's order.

    `trained` has exactly the names that are trained; a tensor that nothing happened to is not copied.
    `optimizer` is named "tensor|field". `restarted` are trained tensors whose state could not be carried over
    (blocks of 8 bits, factored moments): the optimizer makes it anew.
    """

    trained: Tensors
    optimizer: dict[str, Any]
    restarted: tuple[str, ...]


def scales(model: Any) -> dict[str, Adapted]:
    """The adapted weights of a PeftModel, by module. Raises PeftkitError unless it is one unmerged LoRA."""
    from peft.tuners.lora import LoraLayer

    kinds = [str(config.peft_type.value) for config in model.peft_config.values()]
    if kinds != ["LORA"]:
        raise PeftkitError(f"only a model with one LoRA adapter can grow: this one has {', '.join(kinds)}")
    (adapter,) = model.peft_config
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.scaling:
            continue
        if module.merged:
            raise PeftkitError(f"{name} is merged: an adapter grows beside its base")
        # a wrapper of a parameter may wrap another one: which is outside is not for us to rely on
        place = name.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(module, "parameter_name", None)
        weight = f"{place}.{parameter}" if parameter else place
        found[name] = Adapted(weight, int(module.r[adapter]), float(module.scaling[adapter]))
    return found


@dataclass(frozen=True)
class _Origin:
    """Where a tensor of the new adapter comes from."""

    source: str | None  # its old name
    side: str = ""  # "A" | "B"; "" for what is carried over as it is
    factor: float = 1.0  # B' = factor B
    num_experts: int = 1
    same: bool = True  # neither wider nor rescaled


_Origins = Mapping[str, _Origin]  # by the new name


def grow(
    trained: Named,
    optimizer: Mapping[str, Any],
    fresh: Named,
    *,
    old: Scales,
    new: Scales,
    rows: Named | None = None,
) -> Grown:
    """The checkpoint of the new adapter that computes what the old one computed.

    `trained` and `optimizer` are the old checkpoint's, the latter with tensors and plain values alike;
    `fresh` is what the new model trains, at its start, and `old` and `new` are the `scales` of both models.
    `rows` holds directions (k, d_in), or (num_experts, k, d_in), by the weight's name in the base: for the
    new rows of A, or the first rows of a new module's A; more than there is room for are left out. They get
    the mean norm of the rows that were there, and so do PEFT's own, which are taken for the rest.
    Raises PeftkitError where the new adapter cannot hold the old one, or its start is not without effect.
    """
    states: dict[str, _Fields] = {}
    for key, value in optimizer.items():
        name, _, field = key.rpartition("|")
        states.setdefault(name, {})[field] = value
    origins = _origins(trained, fresh, old, new)
    _check(trained, states, fresh, old, new, origins)
    factors = _factors(trained, fresh, origins, new, rows or {})
    grown: Tensors = {}
    state: dict[str, Any] = {}
    restarted = []
    for name, start in fresh.items():
        origin = origins[name]
        plain = (start if origin.source is None else trained[origin.source]).detach()
        # not in `factors`: what is kept, and the bias of a B, which s multiplies too
        rest = plain if origin.factor == 1.0 else plain * origin.factor
        grown[name] = factors.get(name, rest)
        before = states.get(origin.source or "", {})
        after = _grow_state(before, plain, grown[name].shape, origin)
        state.update({f"{name}|{field}": value for field, value in after.items()})
        if before and not after:
            restarted.append(name)
    return Grown(grown, state, tuple(restarted))


def _split(name: str) -> tuple[str, str, str]:
    """The adapting module, the rest of the name, and "A" or "B" for the factors."""
    module, _, piece = name.rpartition(".lora_")
    side = piece.removeprefix("embedding_")[:2]
    return module, piece, side[0] if side in {"A.", "B."} else ""


def _origins(trained: Named, fresh: Named, old: Scales, new: Scales) -> dict[str, _Origin]:
    """The origin of each tensor that the new adapter trains."""
    before = {adapted.weight: module for module, adapted in old.items()}
    found = {}
    for name, start in fresh.items():
        module, piece, side = _split(name)
        if module not in new:
            found[name] = _Origin(name if name in trained else None)
        elif new[module].weight not in before:
            found[name] = _Origin(None, side)
        else:
            origin = before[new[module].weight]
            then, now = old[origin], new[module]
            factor = then.scale / now.scale if side == "B" else 1.0
            same = then.rank == now.rank and factor == 1.0
            # A (num_experts x rank, d_in) is stacked by expert
            num_experts = start.shape[0] // now.rank if side == "A" else 1
            found[name] = _Origin(f"{origin}.lora_{piece}", side, factor, num_experts, same)
    return found


def _check(
    trained: Named, states: Mapping[str, Any], fresh: Named, old: Scales, new: Scales, origins: _Origins
) -> None:
    """Raises PeftkitError with all that stands against the growth."""
    sources = {origin.source: name for name, origin in origins.items() if origin.source is not None}
    after = {adapted.weight: adapted for adapted in new.values()}
    gone = [adapted.weight for adapted in old.values() if adapted.weight not in after]
    wrong = [f"{weight} is not adapted any more" for weight in gone]
    for weight, rank in ((a.weight, a.rank) for a in old.values() if a.weight in after):
        if after[weight].rank < rank:
            wrong.append(f"{weight}: rank {after[weight].rank} is below {rank}")
    wrong += [f"the new adapter does not train {name}" for name in trained if name not in sources]
    wrong += [f"the checkpoint has no {name}" for name in sources if name not in trained]
    wrong += [f"{name} has an optimizer state, but is not trained" for name in states if name not in trained]
    if not wrong:
        wrong = [
            f"{source}: {tuple(trained[source].shape)} does not fit into {tuple(fresh[name].shape)}"
            for source, name in sources.items()
            if not _fits(trained[source], fresh[name], origins[name].side)
        ]
    if wrong:
        raise PeftkitError(f"the adapter cannot grow: {'; '.join(wrong[:5])}")


def _fits(old: torch.Tensor, new: torch.Tensor, side: str) -> bool:
    """Factors may be longer along the rank: axis 0 of A (rank, d_in), axis 1 of B (d_out, rank)."""
    along = {"A": 0, "B": 1}.get(side)
    sizes = enumerate(zip(old.shape, new.shape, strict=False))
    return old.ndim == new.ndim and all(m == n or (axis == along and m < n) for axis, (m, n) in sizes)


def _factors(trained: Named, fresh: Named, origins: _Origins, new: Scales, rows: Named) -> Tensors:
    """A' and B' of every adapted weight, by name."""
    if unknown := sorted(set(rows) - {adapted.weight for adapted in new.values()}):
        raise PeftkitError(f"directions for {unknown[0]}, which the new adapter does not adapt")
    pairs: dict[str, dict[str, str]] = {}
    for name in fresh:
        module, piece, side = _split(name)
        if side and module in new and not piece.endswith(".bias"):
            pairs.setdefault(module, {})[side] = name
    found: Tensors = {}
    for module, pair in pairs.items():
        a, b = pair["A"], pair["B"]
        before, start, old = origins[a].source, (fresh[a].detach(), fresh[b].detach()), None
        if before is not None:
            old = trained[before].detach(), trained[str(origins[b].source)].detach() * origins[b].factor
        found[a], found[b] = _grow_pair(old, start, new[module], rows.get(new[module].weight))
    return found


_Pair = tuple[torch.Tensor, torch.Tensor]  # A (num_experts x rank, d_in), B (d_out, rank x num_experts)


def _grow_pair(old: _Pair | None, start: _Pair, adapted: Adapted, given: torch.Tensor | None) -> _Pair:
    """A' and B' of one weight from the old pair, B already scaled, and PEFT's start of the new pair.

    PEFT stacks A by expert and B by rank: expert e has the rows [e rank, (e + 1) rank) of A and every
    num_experts-th column of B, so that new columns of B are its last ones.
    """
    num_experts = start[0].shape[0] // adapted.rank
    _check_start(start, num_experts, adapted.weight)
    if old is None:
        if given is None:
            return start
        if start[1].any():
            raise PeftkitError(f"{adapted.weight}: B does not start at zero, so A takes no directions")
        old = start[0][:0], start[1][:, :0]
    kept = old[0].shape[0] // num_experts
    like = old[0] if kept else start[0]
    length = _rows_of(like, num_experts).norm(dim=-1).mean(dim=1, keepdim=True)
    a = _as_long(_rows_of(start[0].to(like), num_experts), length)
    if given is not None:
        _put_rows(a, given.to(like), kept, length, adapted.weight)
    b = start[1].to(old[1])
    if a[:, kept:].any():
        b = torch.zeros_like(b)
    else:  # adapters of embeddings start at A = 0
        b = _as_long(b.T.unsqueeze(0), old[1].norm(dim=0).mean().view(1, 1))[0].T.contiguous()
    a[:, :kept] = _rows_of(old[0], num_experts)
    b[:, : old[1].shape[1]] = old[1]
    columns = b.view(b.shape[0], adapted.rank, num_experts).permute(2, 1, 0)
    if not bool((a.any(dim=-1) | columns.any(dim=-1))[:, kept:].all()):
        raise PeftkitError(f"{adapted.weight}: new directions are zero on both sides, and would stay so")
    return a.view(start[0].shape), b


def _rows_of(a: torch.Tensor, num_experts: int) -> torch.Tensor:
    """A as (num_experts, rank, d_in)."""
    return a.reshape(num_experts, -1, a.shape[1])


def _as_long(rows: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The rows (num_experts, n, d) at this norm (num_experts, 1), or as they are where it is zero."""
    own = rows.norm(dim=-1)
    scale = torch.where((own > 0) & (length > 0), length / own, 1.0)
    return rows * scale.unsqueeze(-1)


def _put_rows(a: torch.Tensor, given: torch.Tensor, kept: int, length: torch.Tensor, weight: str) -> None:
    """Into A (num_experts, rank, d_in), behind the rows that are kept."""
    given = given.unsqueeze(0).expand(a.shape[0], -1, -1) if given.ndim == 2 else given
    if given.ndim != 3 or given.shape[::2] != a.shape[::2] or not bool(given.isfinite().all()):
        raise PeftkitError(f"{weight}: directions must be finite rows of {a.shape[2]} numbers")
    directions = _as_long(given, length)[:, : a.shape[1] - kept]
    a[:, kept : kept + directions.shape[1]] = directions


def _check_start(start: _Pair, num_experts: int, weight: str) -> None:
    """Raises PeftkitError where B A is not zero at the start, as after PiSSA, which changes the base."""
    if not (start[0].any() and start[1].any()):
        return
    a = _rows_of(start[0], num_experts).double()
    b = start[1].double().view(start[1].shape[0], -1, num_experts)
    inner, outer = torch.einsum("eri,eqi->erq", a, a), torch.einsum("ore,oqe->erq", b, b)
    effect = float((inner * outer).sum().clamp(min=0).sqrt())  # Frobenius norm of all B A
    if effect > _NO_EFFECT * float(a.norm() * b.norm()):
        raise PeftkitError(f"{weight}: the new adapter starts with an effect; attach it with a plain start")


def _grow_state(fields: _Fields, old: torch.Tensor, shape: torch.Size, origin: _Origin) -> _Fields:
    """Adam's state of a grown tensor; empty where it must be made anew.

    theta' = c theta has the gradient g / c. New entries get no first moment, and the mean of the second
    ones: `step` counts for the whole tensor, so that after zeros the first updates would be far too long.
    """
    if origin.same:
        return dict(fields)
    moments = {key: value for key, value in fields.items() if key in _FIRST | _SECOND}
    is_plain = all(t.shape == old.shape and t.is_floating_point() for t in moments.values())
    if not is_plain or set(fields) - set(moments) - {"step"}:
        return {}
    grown = dict(fields)
    for key, moment in moments.items():
        scaled = moment / (origin.factor if key in _FIRST else origin.factor**2)
        canvas = scaled.new_full(shape, 0.0 if key in _FIRST else float(scaled.double().mean()))
        if origin.side == "A":
            target, part = _rows_of(canvas, origin.num_experts), _rows_of(scaled, origin.num_experts)
            target[:, : part.shape[1]] = part
        else:
            canvas[tuple(slice(size) for size in scaled.shape)] = scaled
        grown[key] = canvas
    return grown
