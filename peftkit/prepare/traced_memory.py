"""Traced memory of a plan: one step on the meta device, cached for next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from peftkit.archs import ModelShape, shape_from_config
from peftkit.evaluate.step import loss_from_logits
from peftkit.hub import cache_folder
from peftkit.methods import METHODS
from peftkit.model.load import read_config
from peftkit.plan import Batch, Decision, Facts, Memory, Peak, Plan
from peftkit.plan.advice import WARNING
from peftkit.plan.fit import check_fit, micro_batches, replace_train, with_micro_batch
from peftkit.plan.memory import CONTEXT_BYTES, malloc_reserve_bytes, peaks_between_steps
from peftkit.plan.plan import TrainPlan
from peftkit.plan.task import trainer_spec
from peftkit.prepare.environment import versions
from peftkit.recipe import LoadedRecipe
from peftkit.rundir import read_json, write_json
from peftkit.units import show_bytes

if TYPE_CHECKING:
    from peftkit.model.meta.trace.step import StepTrace

_MIN_DEPTH = 8  # no stand-in is shallower: peaks of shallow models stand at other moments
_MAX_TRACED_SHARE = 0.8  # three stand-ins are traced only where they have fewer layers than this share of the model's
_MIN_DEPTH_GAP = 4  # layers between two stand-ins
_LINEARITY_TOLERANCE = 0.001  # of a peak, what may be off the line
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with one entry per layer
_MAX_CACHED_TRACES = 256  # traces that are kept


def trace_plan(plan: Plan, config: Mapping[str, object], batch: Batch) -> StepTrace:
    """Trace one step and one evaluation of `plan` on the meta device and return the ledger.

    Raises whatever the model's code raises there.
    """
    from peftkit.model.meta.trace.step import trace_step

    from_logits = partial(loss_from_logits, task=plan.base.task, smoothing=plan.train.label_smoothing)
    loss = None if trainer_spec(plan).loss == "fused" else from_logits
    return trace_step(plan, read_config(config, plan.base), batch, loss=loss)


@dataclass(frozen=True)
class TraceOutcome:
    """A traced memory, or the reason why there is none."""

    memory: Memory | None
    reason: str = ""
    from_cache: bool = False


def trace_memory(plan: Plan, shape: ModelShape, config: Mapping[str, object], batch: Batch) -> TraceOutcome:
    """Return the traced memory of `plan` on `batch`, from the cache where it was traced before."""
    # compute the cache key of a trace:
    plan_json = plan.to_json()
    key_parts = {name: plan_json[name] for name in ("base", "method", "evaluate", "device")}
    key_parts["train"] = {
        name: plan_json["train"][name]
        for name in (
            "optimizer", "micro_batch", "accumulation", "gradient_checkpointing", "autocast", "weight_decay",
            "label_smoothing",
        )
    }  # fmt: skip
    if not plan.base.trust_remote_code:  # else the code that comes with it counts too
        key_parts["base"].pop("id"), key_parts["base"].pop("revision")
    content = {**key_parts, "config": dict(config), "batch": asdict(batch), "versions": versions(), "format": 7}
    cache_key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = cache_folder() / "traces" / f"{cache_key}.json"
    if path.is_file():
        with suppress(OSError, ValueError, KeyError, TypeError):  # a cut file is traced again
            return TraceOutcome(Memory.from_json(read_json(path)), from_cache=True)
    try:
        memory = _trace_or_extrapolate(plan, shape, config, batch)
    except Exception as error:  # noqa: BLE001
        # foreign code on a device without numbers: whatever it raises, there is no prediction
        message = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        return TraceOutcome(None, f"{type(error).__name__}: {message}")
    with suppress(OSError):  # a cache that cannot be written costs the next plan a trace
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(memory))
        paths = path.parent.glob("*.json")
        newest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest_first[_MAX_CACHED_TRACES:]:  # another process may do the same: its OSError ends this one
            path.unlink(missing_ok=True)
    return TraceOutcome(memory)


def plan_with_traced_memory(
    loaded: LoadedRecipe, facts: Facts, plan: Plan, config: Mapping[str, object]
) -> tuple[Plan, str]:
    """Return the plan with its traced memory, and a note where the trace failed.

    Where the traced memory does not fit, the next smaller values that the recipe leaves open are traced, and
    their decisions say so.
    """
    while True:
        assert plan.batch is not None
        outcome = trace_memory(plan, facts.model.shape, config, plan.batch)
        if outcome.memory is None:
            return plan, f"no exact memory prediction, because the trace failed ({outcome.reason})"
        warnings = [warning for warning in _size_warning(plan, outcome.memory) if warning not in plan.decisions]
        plan = replace(plan, memory=outcome.memory, decisions=(*plan.decisions, *warnings))
        fit = check_fit(outcome.memory, facts.device)
        smaller_train = _smaller_train_plan(loaded, plan) if fit.verdict == "does not fit" else None
        if smaller_train is None:
            return plan, ""
        reason = f"the first choice needs {show_bytes(fit.needed_bytes)} in the trace"
        plan = replace_train(plan, smaller_train, facts, reason)


_SIZE_TOLERANCE, _SIZE_TOLERANCE_BYTES = 0.02, 2**20  # buffers, which the closed form does not count


def _size_warning(plan: Plan, traced: Memory) -> list[Decision]:
    """Return a warning where the family's table counts other weights than transformers builds, else nothing.

    A configuration of a known type may have a key that changes the model and that the table does not read.
    """
    if plan.memory is None or plan.memory.depth == "traced":
        return []
    counted, built = (memory.peak.components.get("base weights", 0) for memory in (plan.memory, traced))
    if abs(counted - built) <= _SIZE_TOLERANCE * built + _SIZE_TOLERANCE_BYTES:
        return []
    reason = f"peftkit's table of the family counts {show_bytes(counted)} of weights, transformers builds "
    reason += f"{show_bytes(built)}: its config.json has a key that the table does not read. "
    reason += "Memory is the built model's; parameter counts and time follow the table. Please report this model"
    return [Decision(f"{WARNING}base.id", plan.base.id, "decided", reason)]


def _smaller_train_plan(loaded: LoadedRecipe, plan: Plan) -> TrainPlan | None:
    """Return the next train plan that needs less memory, among values left on auto; None if none is left."""
    train, requested = plan.train, loaded.recipe.train
    sizes = [size for size in micro_batches(train.batch_size) if size < train.micro_batch]
    if requested.micro_batch == "auto" and sizes:
        return with_micro_batch(plan, sizes[0]).train
    may_checkpoint = requested.gradient_checkpointing == "auto" and METHODS[plan.method.name].allows_checkpointing
    next_level = {"none": "selective", "selective": "full"}.get(train.gradient_checkpointing)
    return replace(train, gradient_checkpointing=next_level) if may_checkpoint and next_level else None


def _trace_or_extrapolate(plan: Plan, shape: ModelShape, config: Mapping[str, object], batch: Batch) -> Memory:
    """Trace three shallow models and extrapolate where that is exact; else trace the whole model."""
    period = 2 if plan.train.gradient_checkpointing == "selective" else 1
    depths = _stand_in_depths(shape, config, period=period)
    if depths is not None:
        traces = [trace_plan(_plan_with_layers(plan, n), _config_with_layers(config, n), batch) for n in depths]
        if _is_linear_in_depth(traces):
            near, far = (depths[0], traces[0]), (depths[-1], traces[-1])
            return _extrapolate(plan, shape, batch, near, far)
    full_trace = trace_plan(plan, config, batch)
    return memory_from_components(plan, shape, batch, _bytes_by_phase(full_trace), full_trace.reserved_bytes)


def _is_linear_in_depth(traces: Sequence[StepTrace]) -> bool:
    """Return whether every component at every peak is linear in the number of layers, over three depths.

    With bytes low, middle, high of one component in one phase at depths n, n + g, n + 2g, require
    |middle - (low + high) / 2| <= _LINEARITY_TOLERANCE * (all bytes of that phase at n + g).
    A peak may fall at another moment in a deeper model. The top of the backward pass is a phase of its own;
    below it ("backward below") the peak is early or late. Where the bytes of the optimizer step without
    temporaries, all gradients included, grow by more than that peak does, it will be late in a deeper model.

    Example, activations in MiB as the only component of the phase "forward", at depths 8, 12, 16:
    80, 120, 160   midpoint 120, off by 0                      -> linear
    80, 120, 161   midpoint 120.5, off by 0.5 > 0.001 * 120    -> not linear
    phases of the first and last depth differ                  -> not linear
    backward below +10, optimizer step +12                     -> not linear
    """
    low, middle, high = (_bytes_by_phase(trace_at_depth) for trace_at_depth in traces)
    if {*low} != {*high}:
        return False
    static_bytes = [
        sum(parts["optimizer step"].values()) - parts["optimizer step"].get("temporaries", 0) for parts in (low, high)
    ]
    backward_bytes = [sum(parts.get("backward below", {}).values()) for parts in (low, high)]
    if (
        static_bytes[1] - static_bytes[0]
        > backward_bytes[1] - backward_bytes[0] + _LINEARITY_TOLERANCE * backward_bytes[1]
    ):
        return False
    for phase, parts in middle.items():
        tolerance = _LINEARITY_TOLERANCE * sum(parts.values())
        for name in {*low[phase], *parts, *high[phase]}:
            midpoint = (low[phase].get(name, 0) + high[phase].get(name, 0)) / 2
            if abs(parts.get(name, 0) - midpoint) > tolerance:
                return False
    return True


def _plan_with_layers(plan: Plan, depth: int) -> Plan:
    """Return the plan for a model of `depth` layers: prefixes have one part per layer."""
    spec = plan.method.peft
    if spec is None or "num_layers" not in spec.arguments:
        return plan
    new_spec = replace(spec, arguments={**spec.arguments, "num_layers": depth})
    return replace(plan, method=replace(plan.method, peft=new_spec))


def _bytes_by_phase(trace: StepTrace) -> dict[str, dict[str, float]]:
    """Return the bytes of each component, by phase."""
    return {phase: dict(snapshot.components) for phase, snapshot in trace.split_peaks.items()}


def _extrapolate(
    plan: Plan, shape: ModelShape, batch: Batch, near: tuple[int, StepTrace], far: tuple[int, StepTrace]
) -> Memory:
    """Return the memory of the whole model, extrapolated from two depths, per component and phase.

    bytes(n) = low + (n - near) / (far - near) * (high - low), with low and high at depths near and far.

    Example: 80 MiB at 8 layers and 160 MiB at 16 give 80 + (48 - 8) / (16 - 8) * 80 = 480 MiB at 48.
    """
    factor = (shape.dims.num_layers - near[0]) / (far[0] - near[0])
    low, high = _bytes_by_phase(near[1]), _bytes_by_phase(far[1])
    phases = {
        phase: {
            name: low[phase].get(name, 0) + factor * (high[phase].get(name, 0) - low[phase].get(name, 0))
            for name in {*low[phase], *high[phase]}
        }
        for phase in high
    }
    reserved_bytes = near[1].reserved_bytes + factor * (far[1].reserved_bytes - near[1].reserved_bytes)
    return memory_from_components(plan, shape, batch, phases, int(reserved_bytes))


def memory_from_components(
    plan: Plan, shape: ModelShape, batch: Batch, phases: Mapping[str, Mapping[str, float]], reserved_bytes: int
) -> Memory:
    """Build the plan's Memory from traced components, with the cache of generation added."""
    top, below = phases["backward"], phases.get("backward below", {})
    phases = {name: parts for name, parts in phases.items() if name != "backward below"}
    phases["backward"] = max(top, below, key=lambda parts: sum(parts.values()))
    peaks = [
        Peak(phase, {name: round(size) for name, size in sizes.items() if round(size) > 0})
        for phase, sizes in phases.items()
        if phase != "evaluation" or batch.eval_rows
    ]
    constant_names = {"base weights", "adapter", "optimizer", "workspaces"}
    constant_bytes = {name: size for name, size in peaks[0].components.items() if name in constant_names}
    peaks += peaks_between_steps(shape, plan, batch, constant_bytes)
    peak_bytes = max(peak.allocated_bytes for peak in peaks)
    total_bytes = reserved_bytes if plan.device == "cuda" else peak_bytes + malloc_reserve_bytes(peaks)
    return Memory(
        depth="traced",
        peaks=tuple(peaks),
        reserved_bytes=max(peak_bytes, total_bytes),
        context_bytes=CONTEXT_BYTES[plan.device],
        host_bytes=plan.memory.host_bytes if plan.memory else 0,
        bound="",
    )


def _stand_in_depths(shape: ModelShape, config: Mapping[str, object], *, period: int) -> tuple[int, int, int] | None:
    """Return three evenly spaced smaller depths to trace instead of the model; None to trace it whole.

    Layers of different kinds repeat every `cycle` layers, a multiple of `period`. With N layers, the depths
    are near = 8 + (N - 8) mod cycle, near + gap and near + 2 * gap, where gap is the smallest multiple of
    cycle that is at least _MIN_DEPTH_GAP. They are used only if their sum is at most _MAX_TRACED_SHARE * N.

    Example, period 1:
    N = 48: cycle 1, gap 4, depths 8, 12, 16: sum 36 <= 38.4 -> (8, 12, 16)
    N = 32: the same depths: sum 36 > 25.6                   -> None
    """
    num_layers = shape.dims.num_layers
    if len(shape.family.stacks) != 1 or shape.family.inferred:
        return None
    for cycle in range(period, num_layers // 3 + 1, period):
        gap = -(-_MIN_DEPTH_GAP // cycle) * cycle
        near = _MIN_DEPTH + (num_layers - _MIN_DEPTH) % cycle
        if 3 * (near + gap) > _MAX_TRACED_SHARE * num_layers:
            return None
        if _counts_are_linear(shape, config, near, near + 2 * gap):
            return near, near + gap, near + 2 * gap
    return None


def _counts_are_linear(shape: ModelShape, config: Mapping[str, object], near: int, far: int) -> bool:
    """Return whether parameter, cache and window counts at two depths extrapolate exactly."""

    def counts(shape_at_depth: ModelShape) -> dict[str, int]:
        windows = {" windows": shape_at_depth.num_windowed, " cached": shape_at_depth.num_cached_layers}
        return {**shape_at_depth.by_role(), **windows, " state": shape_at_depth.state_per_sequence}

    try:
        shapes = [shape_from_config(_config_with_layers(config, depth), task=shape.task) for depth in (near, far)]
    except (KeyError, ValueError):
        return False
    if shapes[0] is None or shapes[1] is None or shapes[1].dims.num_layers != far:
        return False
    low, high, whole = counts(shapes[0]), counts(shapes[1]), counts(shape)
    factor = (shape.dims.num_layers - near) / (far - near)
    return all(whole[k] == low.get(k, 0) + factor * (high.get(k, 0) - low.get(k, 0)) for k in whole)


def _config_with_layers(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Return the configuration of the same model with `depth` layers."""
    new_config = dict(config)
    for key in _LAYER_KEYS:
        if isinstance(new_config.get(key), int):
            new_config[key] = depth
    for key in _PER_LAYER_KEYS:
        if isinstance(new_config.get(key), list):
            new_config[key] = new_config[key][:depth]
    return new_config
