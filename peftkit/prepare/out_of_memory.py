"""Out of memory in a run: in which phase, what exceeded the plan there, what is smaller and fits."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace

from peftkit.errors import Problem
from peftkit.plan import Facts, Peak, Plan
from peftkit.plan.changes import nearest_changes
from peftkit.plan.fit import micro_batches, revised, with_micro_batch
from peftkit.plan.memory import evaluation_rows
from peftkit.recipe import LoadedRecipe
from peftkit.units import show_bytes

# Where a frame of the traceback stands tells the phase; the innermost that tells anything counts.
_PHASES = (
    ("/peftkit/model/load.py", "loading"),
    ("/peftkit/model/adapter.py", "start of the adapter"),
    ("/peftkit/evaluate/generation.py", "generation"),
    ("/peftkit/evaluate/losses.py", "evaluation"),
    ("/peftkit/train/snapshot.py", "checkpoint write"),
    ("/torch/optim/", "optimizer step"),
    ("/bitsandbytes/optim/", "optimizer step"),
    ("/torch/autograd/graph.py", "backward"),
)
_STILL = {"base weights", "adapter", "workspaces"}  # there from the start: they do not grow
_GROWS_IN = {"optimizer": "optimizer step", "gradients": "backward"}  # and lie still in other phases


@dataclass(frozen=True)
class Shortage:
    """Where memory ran out. `step` is None before the first."""

    phase: str
    step: int | None
    occupied_bytes: int


def shortage_of(error: BaseException, *, step: int | None, occupied_bytes: int) -> Shortage:
    """The phase in which an out-of-memory error was raised, by its traceback."""
    phase = "forward"
    for frame in traceback.extract_tb(error.__traceback__):
        name = frame.filename.replace("\\", "/")
        phase = next((told for part, told in _PHASES if part in name), phase)
    return Shortage(phase, step, occupied_bytes)


def _planned_peak(plan: Plan, phase: str) -> Peak | None:
    peaks = plan.memory.peaks if plan.memory else ()
    return next((peak for peak in peaks if peak.phase == phase), None)


def exceeded(plan: Plan, shortage: Shortage) -> str:
    """In words: the component that grows in that phase, what the plan has for it, and what was there."""
    there = f"{show_bytes(shortage.occupied_bytes)} were in use"
    peak = _planned_peak(plan, shortage.phase)
    if peak is None:
        return f"in {shortage.phase}, for which the plan has no peak; {there}"
    growing = [
        name
        for name in peak.components
        if name not in _STILL and _GROWS_IN.get(name, shortage.phase) == shortage.phase
    ]
    name = max(growing or peak.components, key=lambda part: peak.components[part])
    planned = f"{show_bytes(peak.components[name])} of {show_bytes(peak.allocated_bytes)} planned"
    return f"in the {shortage.phase}, for {name} ({planned}); {there}"


def problem(loaded: LoadedRecipe, facts: Facts, plan: Plan, shortage: Shortage, where: str) -> Problem:
    """What the user is told, with the smallest change that needs less than what was lacking."""
    when = "before the first step" if shortage.step is None else f"in step {shortage.step + 1}"
    lacking = plan.memory.needed_bytes if plan.memory else facts.device.memory_bytes
    room = min(lacking - 1, facts.device.memory_bytes - facts.device.used_bytes)
    limited = replace(facts, device=replace(facts.device, memory_bytes=room, used_bytes=0))
    changes = nearest_changes(loaded, limited, plan)
    fix = "use a smaller base or a larger device"
    if changes:
        change = changes[0]
        fix = f"train anew with {' '.join(change.overrides)} (needs {show_bytes(change.needed_bytes)})"
        if plan.train.micro_batch > 1:
            fix += ", or with train.on_oom=adapt, which goes on in smaller pieces by itself"
    return Problem(
        where, f"out of memory {when}, {exceeded(plan, shortage)}", "a step that fits as planned", fix
    )


def smaller(plan: Plan, facts: Facts, shortage: Shortage) -> Plan | None:
    """The same global batch in the next smaller pieces; None where no piece is smaller, or none would help.

    Every decision keeps its reason: the new ones say what happened.
    """
    sizes = [size for size in micro_batches(plan.train.batch_size) if size < plan.train.micro_batch]
    if not sizes or shortage.phase not in {"forward", "backward", "evaluation"}:
        return None
    made = with_micro_batch(plan, sizes[0])
    if shortage.phase == "evaluation" and evaluation_rows(made) == evaluation_rows(plan):
        return None  # a CPU looks at eight held-out rows whatever the micro-batch
    reason = f"on_oom: adapt, after {plan.train.micro_batch} at once ran out of memory"
    return revised(plan, made.train, facts, reason)
