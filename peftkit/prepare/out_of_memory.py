"""Out of memory in a run: the phase, what exceeded the plan there, and a smaller plan that fits."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace

from peftkit.errors import Problem
from peftkit.plan import Facts, Plan
from peftkit.plan.changes import nearest_changes
from peftkit.plan.fit import micro_batches, replace_train, with_micro_batch
from peftkit.plan.memory import evaluation_rows
from peftkit.recipe import LoadedRecipe
from peftkit.units import show_bytes

# Where a frame of the traceback stands tells the phase; the innermost that tells anything counts.
_PHASES = (
    ("/peftkit/model/load.py", "loading"),
    ("/peftkit/model/adapter/attach.py", "start of the adapter"),
    ("/peftkit/evaluate/generation.py", "generation"),
    ("/peftkit/evaluate/losses.py", "evaluation"),
    ("/peftkit/train/checkpoint/snapshot.py", "checkpoint write"),
    ("/torch/optim/", "optimizer step"),
    ("/bitsandbytes/optim/", "optimizer step"),
    ("/torch/autograd/graph.py", "backward"),
)
_CONSTANT_COMPONENTS = {"base weights", "adapter", "workspaces"}  # there from the start: they do not grow
_GROWTH_PHASE = {"optimizer": "optimizer step", "gradients": "backward"}  # and lie still in other phases


@dataclass(frozen=True)
class Shortage:
    """An out-of-memory failure. `step` is None before the first step."""

    phase: str
    step: int | None
    occupied_bytes: int


def find_shortage(error: BaseException, *, step: int | None, occupied_bytes: int) -> Shortage:
    """Return the phase in which an out-of-memory error was raised, from its traceback."""
    phase = "forward"
    for frame in traceback.extract_tb(error.__traceback__):
        name = frame.filename.replace("\\", "/")
        phase = next((phase_name for path_part, phase_name in _PHASES if path_part in name), phase)
    return Shortage(phase, step, occupied_bytes)


def describe_shortage(plan: Plan, shortage: Shortage) -> str:
    """Describe the shortage: the component that grows in its phase, its planned bytes, and the usage."""
    usage = f"{show_bytes(shortage.occupied_bytes)} were in use"
    peaks = plan.memory.peaks if plan.memory else ()
    peak = next((peak for peak in peaks if peak.phase == shortage.phase), None)
    if peak is None:
        return f"in {shortage.phase}, for which the plan has no peak; {usage}"
    growing = [
        name
        for name in peak.components
        if name not in _CONSTANT_COMPONENTS and _GROWTH_PHASE.get(name, shortage.phase) == shortage.phase
    ]
    name = max(growing or peak.components, key=lambda part: peak.components[part])
    planned_text = f"{show_bytes(peak.components[name])} of {show_bytes(peak.allocated_bytes)} planned"
    return f"in the {shortage.phase}, for {name} ({planned_text}); {usage}"


def shortage_problem(loaded: LoadedRecipe, facts: Facts, plan: Plan, shortage: Shortage, where: str) -> Problem:
    """Return the problem for the user, with the smallest change that needs less memory."""
    moment = "before the first step" if shortage.step is None else f"in step {shortage.step + 1}"
    needed_bytes = plan.memory.needed_bytes if plan.memory else facts.device.memory_bytes
    available_bytes = min(needed_bytes - 1, facts.device.memory_bytes - facts.device.used_bytes)
    limited_facts = replace(facts, device=replace(facts.device, memory_bytes=available_bytes, used_bytes=0))
    changes = nearest_changes(loaded, limited_facts, plan)
    fix = "use a smaller base or a larger device"
    if changes:
        change = changes[0]
        fix = f"train again with {' '.join(change.overrides)} (needs {show_bytes(change.needed_bytes)})"
        if plan.train.micro_batch > 1 and plan.ranks.num == 1:
            fix += ", or with train.on_oom=adapt, which continues with a smaller micro-batch by itself"
    return Problem(
        where, f"out of memory {moment}, {describe_shortage(plan, shortage)}", "a step that fits as planned", fix
    )


def plan_smaller_micro_batch(plan: Plan, facts: Facts, shortage: Shortage) -> Plan | None:
    """Return the plan with the same global batch in smaller micro-batches.

    None where there is no smaller micro-batch, or it would not help in that phase. Every decision keeps its
    reason; the changed ones say what happened.
    """
    sizes = [size for size in micro_batches(plan.train.batch_size) if size < plan.train.micro_batch]
    if not sizes or shortage.phase not in {"forward", "backward", "evaluation"}:
        return None
    smaller_plan = with_micro_batch(plan, sizes[0])
    if shortage.phase == "evaluation" and evaluation_rows(smaller_plan) == evaluation_rows(plan):
        return None  # a CPU looks at eight held-out rows whatever the micro-batch
    reason = f"on_oom: adapt, after a micro-batch of {plan.train.micro_batch} ran out of memory"
    return replace_train(plan, smaller_plan.train, facts, reason)
