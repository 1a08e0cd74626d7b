"""From a plan to its memory: traced where the model can be built on the meta device, kept for next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from peftkit.archs import ModelShape, shape_from_config
from peftkit.hub import cache_folder
from peftkit.methods import METHODS
from peftkit.plan import Batch, Facts, Memory, Peak, Plan
from peftkit.plan.fit import judge, micro_batches, revised, with_micro_batch
from peftkit.plan.memory import CONTEXT_BYTES, between_steps, kept_by_malloc
from peftkit.plan.plan import TrainPlan
from peftkit.prepare.environment import versions
from peftkit.recipe import LoadedRecipe
from peftkit.rundir import read_json, write_json
from peftkit.units import show_bytes

if TYPE_CHECKING:
    from peftkit.model.meta.trace.step import Traced

_FEW_LAYERS = 8  # no stand-in is shallower: peaks of shallow models stand at other moments
_WORTH = 0.8  # three stand-ins are traced only where they have fewer layers than this share of the model's
_GAP = 4  # layers between two stand-ins
_UNEVEN = 0.001  # of a peak, what may be off the line
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with one entry per layer
_CACHED = 256  # traces that are kept


def traced(plan: Plan, config: Mapping[str, Any], batch: Batch) -> Traced:
    """The ledger of one step and one evaluation of `plan` on the meta device.

    Raises whatever the model's code raises there.
    """
    from peftkit.model.load import read_config
    from peftkit.model.meta.trace.step import trace
    from peftkit.train.objectives import sft, supervised
    from peftkit.train.training import objective

    task = plan.base.task
    fused = objective(plan) is sft

    def trained(model: Any, inputs: Mapping[str, Any]) -> Any:
        return supervised.loss(model, inputs, task)

    return trace(plan, read_config(config, plan.base), batch, loss=None if fused else trained)


@dataclass(frozen=True)
class Outcome:
    """A traced memory, or why there is none."""

    memory: Memory | None
    reason: str = ""
    from_cache: bool = False


def trace_memory(plan: Plan, shape: ModelShape, config: Mapping[str, Any], batch: Batch) -> Outcome:
    """The memory of `plan` on `batch` by the ledger, from the cache where it was traced before."""
    path = cache_folder() / "traces" / f"{_key(plan, config, batch)}.json"
    if path.is_file():
        with suppress(OSError, ValueError, KeyError, TypeError):  # a cut file is traced again
            return Outcome(Memory.from_json(read_json(path)), from_cache=True)
    try:
        memory = _memory(plan, shape, config, batch)
    except Exception as error:  # noqa: BLE001
        # foreign code on a device without numbers: whatever it raises, there is no prediction
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        return Outcome(None, f"{type(error).__name__}: {line}")
    with suppress(OSError):  # a cache that cannot be written costs the next plan a trace
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(memory))
        _forget_old(path.parent.glob("*.json"))
    return Outcome(memory)


def settle(loaded: LoadedRecipe, facts: Facts, plan: Plan, config: Mapping[str, Any]) -> tuple[Plan, str]:
    """(the plan with its traced memory, what is to be told).

    Where the trace finds that the chosen values do not fit after all, the next smaller ones that the recipe
    leaves open are traced, and their decisions say so.
    """
    while True:
        assert plan.batch is not None
        found = trace_memory(plan, facts.model.shape, config, plan.batch)
        if found.memory is None:
            return plan, f"no exact prediction of memory, because the trace stopped ({found.reason})"
        plan = replace(plan, memory=found.memory)
        fit = judge(found.memory, facts.device)
        smaller = _next_smaller(loaded, plan) if fit.verdict == "does not fit" else None
        if smaller is None:
            return plan, ""
        reason = f"what was chosen first needs {show_bytes(fit.needed_bytes)}, as the trace found"
        plan = revised(plan, smaller, facts, reason)


def _next_smaller(loaded: LoadedRecipe, plan: Plan) -> TrainPlan | None:
    """The next values that take less, of those that the recipe leaves to the plan."""
    train, asked = plan.train, loaded.recipe.train
    sizes = [size for size in micro_batches(train.batch_size) if size < train.micro_batch]
    if asked.micro_batch == "auto" and sizes:
        return with_micro_batch(plan, sizes[0]).train
    can = asked.gradient_checkpointing == "auto" and METHODS[plan.method.name].allows_checkpointing
    more = {"none": "selective", "selective": "full"}.get(train.gradient_checkpointing)
    return replace(train, gradient_checkpointing=more) if can and more else None


def _forget_old(paths: Any) -> None:
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first[_CACHED:]:  # another process may do the same: its OSError ends this one
        path.unlink(missing_ok=True)


def _key(plan: Plan, config: Mapping[str, Any], batch: Batch) -> str:
    """What a trace depends on: decisions without their reasons, the shapes, and every library's version."""
    parts = plan.to_json()
    kept = {name: parts[name] for name in ("base", "method", "evaluate", "device")}
    kept["train"] = {
        name: parts["train"][name]
        for name in (
            "optimizer", "micro_batch", "accumulation", "gradient_checkpointing", "autocast", "weight_decay",
        )
    }  # fmt: skip
    if not plan.base.trust_remote_code:  # else the code that comes with it counts too
        kept["base"].pop("id"), kept["base"].pop("revision")
    whole = {**kept, "config": dict(config), "batch": asdict(batch), "versions": versions(), "format": 7}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _memory(plan: Plan, shape: ModelShape, config: Mapping[str, Any], batch: Batch) -> Memory:
    period = 2 if plan.train.gradient_checkpointing == "selective" else 1
    depths = _shallow(shape, config, period=period)
    if depths is not None:
        found = [traced(_for_layers(plan, n), _with_layers(config, n), batch) for n in depths]
        if _on_a_line(found):
            near, far = (depths[0], found[0]), (depths[-1], found[-1])
            return _extrapolated(plan, shape, batch, near, far)
    whole = traced(plan, config, batch)
    return as_memory(plan, shape, batch, _components(whole), whole.reserved_bytes)


def _on_a_line(found: Sequence[Traced]) -> bool:
    """Whether every component at every peak grows evenly over the three depths.

    A peak may stand at one moment in a shallow model and at another in a deep one. The top of the backward
    pass is looked at apart; below it the peak is early or late, and where all gradients together grow faster
    than it does, it will be late in a deeper model.
    """
    low, middle, high = (_components(one) for one in found)
    if {*low} != {*high}:
        return False
    ends = [
        sum(parts["optimizer step"].values()) - parts["optimizer step"].get("temporaries", 0)
        for parts in (low, high)
    ]
    highest = [sum(parts.get("backward below", {}).values()) for parts in (low, high)]
    if ends[1] - ends[0] > highest[1] - highest[0] + _UNEVEN * highest[1]:
        return False
    for phase, parts in middle.items():
        slack = _UNEVEN * sum(parts.values())
        for name in {*low[phase], *parts, *high[phase]}:
            between = (low[phase].get(name, 0) + high[phase].get(name, 0)) / 2
            if abs(parts.get(name, 0) - between) > slack:
                return False
    return True


def _for_layers(plan: Plan, depth: int) -> Plan:
    """The plan for a model of fewer layers: prefixes have one part per layer."""
    spec = plan.method.peft
    if spec is None or "num_layers" not in spec.arguments:
        return plan
    made = replace(spec, arguments={**spec.arguments, "num_layers": depth})
    return replace(plan, method=replace(plan.method, peft=made))


def _components(found: Traced) -> dict[str, dict[str, float]]:
    return {phase: dict(snapshot.components) for phase, snapshot in found.moments.items()}


def _extrapolated(
    plan: Plan, shape: ModelShape, batch: Batch, near: tuple[int, Traced], far: tuple[int, Traced]
) -> Memory:
    """Each component is linear in the number of layers: two of the depths give any other."""
    times = (shape.dims.num_layers - near[0]) / (far[0] - near[0])
    low, high = _components(near[1]), _components(far[1])
    phases = {
        phase: {
            name: low[phase].get(name, 0) + times * (high[phase].get(name, 0) - low[phase].get(name, 0))
            for name in {*low[phase], *high[phase]}
        }
        for phase in high
    }
    reserved = near[1].reserved_bytes + times * (far[1].reserved_bytes - near[1].reserved_bytes)
    return as_memory(plan, shape, batch, phases, int(reserved))


def as_memory(
    plan: Plan,
    shape: ModelShape,
    batch: Batch,
    phases: Mapping[str, Mapping[str, float]],
    reserved_bytes: int,
) -> Memory:
    """The plan's value from traced components, with generation's cache beside them."""
    top, below = phases["backward"], phases.get("backward below", {})
    phases = {name: parts for name, parts in phases.items() if name != "backward below"}
    phases["backward"] = max(top, below, key=lambda parts: sum(parts.values()))
    peaks = [
        Peak(phase, {name: round(size) for name, size in sizes.items() if round(size) > 0})
        for phase, sizes in phases.items()
        if phase != "evaluation" or batch.eval_rows
    ]
    still = {"base weights", "adapter", "optimizer", "workspaces"}
    held = {name: size for name, size in peaks[0].components.items() if name in still}
    peaks += between_steps(shape, plan, batch, held)
    highest = max(peak.allocated_bytes for peak in peaks)
    reserved = reserved_bytes if plan.device == "cuda" else highest + kept_by_malloc(plan, peaks)
    return Memory(
        depth="traced",
        peaks=tuple(peaks),
        reserved_bytes=max(highest, reserved),
        context_bytes=CONTEXT_BYTES[plan.device],
        host_bytes=plan.memory.host_bytes if plan.memory else 0,
        bound="",
    )


def _shallow(shape: ModelShape, config: Mapping[str, Any], *, period: int) -> tuple[int, int, int] | None:
    """Three smaller depths, evenly spaced, that stand for the whole model; None where it is traced as it is.

    Layers of different kinds must come in the same turns in all of them: every `period` layers something
    repeats, whatever the family's own turns are.
    """
    num = shape.dims.num_layers
    if len(shape.family.stacks) != 1 or shape.family.inferred:
        return None
    for turn in range(period, num // 3 + 1, period):
        gap = -(-_GAP // turn) * turn
        near = _FEW_LAYERS + (num - _FEW_LAYERS) % turn
        if 3 * (near + gap) > _WORTH * num:
            return None
        if _stand_for(shape, config, near, near + 2 * gap):
            return near, near + gap, near + 2 * gap
    return None


def _stand_for(shape: ModelShape, config: Mapping[str, Any], near: int, far: int) -> bool:
    """Whether parameters, caches and windows of the whole model follow from those at two depths."""

    def counts(one: ModelShape) -> dict[str, int]:
        windows = {" windows": one.num_windowed, " cached": one.num_cached_layers}
        return {**one.by_role(), **windows, " state": one.state_per_sequence}

    try:
        made = [shape_from_config(_with_layers(config, depth), task=shape.task) for depth in (near, far)]
    except (KeyError, ValueError):
        return False
    if made[0] is None or made[1] is None or made[1].dims.num_layers != far:
        return False
    low, high, whole = counts(made[0]), counts(made[1]), counts(shape)
    times = (shape.dims.num_layers - near) / (far - near)
    return all(whole[k] == low.get(k, 0) + times * (high.get(k, 0) - low.get(k, 0)) for k in whole)


def _with_layers(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The configuration of the same model with fewer layers."""
    made = dict(config)
    for key in _LAYER_KEYS:
        if isinstance(made.get(key), int):
            made[key] = depth
    for key in _PER_LAYER:
        if isinstance(made.get(key), list):
            made[key] = made[key][:depth]
    return made
