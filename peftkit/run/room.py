"""What a run will write, worked out before it begins: a disk that fills on the way is a lost night."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.plan import Plan
from peftkit.rundir import RunDir
from peftkit.units import show_bytes

_CHECKPOINTS = 4  # the newest two, the best, and the one being written
_FP32 = 4
_SLACK = 1.02  # headers, logs, tokenizers


def checkpoint_bytes(plan: Plan) -> int:
    """A checkpoint: what is trained, and the optimizer's states."""
    states = plan.memory.peak.components.get("optimizer", 0) if plan.memory else 0
    return (plan.method.num_trainable or 0) * _FP32 + states


def result_bytes(plan: Plan) -> int:
    """The adapter, or the whole model."""
    return (plan.method.num_trainable or 0) * _FP32


def run_bytes(plan: Plan) -> int:
    """All that a run's folder holds at its fullest."""
    steps, every = plan.train.num_steps or 1, plan.train.checkpoint_steps
    num = min(_CHECKPOINTS, math.ceil(steps / every) + 1)
    return round(_SLACK * (num * checkpoint_bytes(plan) + result_bytes(plan)))


def refuse_without_room(plan: Plan, run: RunDir) -> None:
    """Raises UserError where the run's disk has less free than the run will write."""
    held = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    needed, free = run_bytes(plan) - held, shutil.disk_usage(run.path).free
    if needed > free:
        one = show_bytes(checkpoint_bytes(plan))
        got = f"{show_bytes(free)} free for checkpoints of {one} and the result"
        fix = "make room, choose another --out, or checkpoint less of the model"
        raise UserError(Problem(str(run.path), got, f"{show_bytes(needed)} free", fix))


def refuse_without_room_for(folder: Path, num_bytes: int, what: str) -> None:
    """Raises UserError where less than `num_bytes` are free for `what`, on the disk of a folder to come."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        got = f"{show_bytes(free)} free for {what}"
        fix = "make room, or set PEFTKIT_CACHE to a folder on another disk"
        raise UserError(Problem(str(folder), got, f"{show_bytes(num_bytes)} free", fix))
