"""What a run will write, worked out before it begins: a disk that fills on the way is a lost night."""

from __future__ import annotations

import math

from peftkit.plan import Plan
from peftkit.rundir import RunDir, refuse_without_room
from peftkit.units import show_bytes

_CHECKPOINTS = 3  # the newest two, and the one being written; one more where there is a best
_FP32 = 4
_SLACK = 1.02  # headers, logs
_TOKENIZER_BYTES = 2**24  # beside the result


def checkpoint_bytes(plan: Plan) -> int:
    """A checkpoint: what is trained, and the optimizer's states."""
    peaks = plan.memory.peaks if plan.memory else ()
    states = max((peak.components.get("optimizer", 0) for peak in peaks), default=0)
    return (plan.method.num_trainable or 0) * _FP32 + states


def run_bytes(plan: Plan) -> int:
    """All that a run's folder holds at its fullest: checkpoints, and the adapter or the whole model."""
    steps, every = plan.train.num_steps or 1, plan.train.checkpoint_steps
    has_best = plan.batch is not None and plan.batch.eval_rows > 0
    num = min(_CHECKPOINTS + has_best, math.ceil(steps / every) + 1)
    result = (plan.method.num_trainable or 0) * _FP32 + _TOKENIZER_BYTES
    return round(_SLACK * (num * checkpoint_bytes(plan) + result))


def refuse_a_full_disk(plan: Plan, run: RunDir) -> None:
    """Raises UserError where the run's disk has less free than the run will still write."""
    folders = [run.checkpoint(step) for step in run.checkpoint_steps()]
    held = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    what = f"checkpoints of {show_bytes(checkpoint_bytes(plan))} and the result"
    fix = "make room, or choose another --out"
    refuse_without_room(run.path, run_bytes(plan) - held, what=what, fix=fix)
