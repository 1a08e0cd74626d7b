"""A growth in a run directory: checkpoints of the old adapter aside, those of the grown one in their place.

plan.json is the point of no return: a kill before it leaves the run as it was, one after it goes on with the
growth, by `settle_growths`. The same holds for taking a growth back.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.plan import Plan, read_plan
from peftkit.plan.plan import Growth
from peftkit.rundir import MANIFEST, RunDir, publish_folder, read_json, write_json, write_sealed

_KEPT_FACTS = ("fingerprints", "num_rollbacks", "epoch", "samples_seen")


def folder_of(run: RunDir, number: int) -> Path:
    """Where the growth of a number (from 1) keeps what was there before it."""
    return run.path / "growths" / str(number)


def write_growth(
    run: RunDir, before: Plan, after: Plan, *, checkpoint: Path, grown: Any, optimizer: Mapping[str, Any]
) -> None:
    """Grow the run from `before`, at a checkpoint, to `after`, whose last growth this is.

    `grown` holds the tensors of the new checkpoint, made by `model/adapter/grow.py`, `optimizer` those of its
    optimizer: none where that begins anew.
    """
    from safetensors.torch import save_file

    folder = folder_of(run, len(after.growths))
    if folder.exists():
        shutil.rmtree(folder)  # of a try that was killed before it counted
    folder.mkdir(parents=True)
    write_sealed(folder / "plan.json", before.to_json())
    state, trainer = (read_json(checkpoint / name) for name in ("state.json", "trainer_state.json"))
    manifest = read_json(checkpoint / MANIFEST)
    facts = {key: manifest[key] for key in _KEPT_FACTS if key in manifest}
    tensors = {k: v for k, v in optimizer.items() if hasattr(v, "shape")}
    values = {k: v for k, v in optimizer.items() if not hasattr(v, "shape")}
    with publish_folder(folder / "grown" / checkpoint.name, step=trainer["global_step"], **facts) as staging:
        for stem, named in (("trained", grown.trained), ("optimizer", tensors)):
            made = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
            save_file(made, staging / f"{stem}.safetensors")
        shutil.copyfile(checkpoint / "random.safetensors", staging / "random.safetensors")
        write_json(staging / "state.json", _as_grown(state, values))
        write_json(staging / "trainer_state.json", {**trainer, "max_steps": after.train.num_steps})
    write_sealed(run.path / "plan.json", after.to_json())
    settle_growths(run, after)


def _as_grown(state: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's state for the grown adapter: the best so far was another's, the vitals go on."""
    progress = {**state["progress"], "best_loss": None, "best_step": None}
    progress |= {"earlier_loss": None, "earlier_step": None, "num_without_gain": 0, "patience_loss": None}
    return {**state, "optimizer": dict(values), "progress": progress}


def settle_growths(run: RunDir, plan: Plan) -> None:
    """Move checkpoints to where the plan says that the run stands; again and again to the same."""
    for number, growth in enumerate(plan.growths, start=1):
        folder = folder_of(run, number)
        before, grown, left = folder / "checkpoints", folder / "grown", folder / "left"
        if growth.kept and grown.exists():
            if not before.exists() and run.checkpoints.exists():
                run.checkpoints.rename(before)
            grown.rename(run.checkpoints)
        if not growth.kept and before.exists():
            if not left.exists() and run.checkpoints.exists():
                run.checkpoints.rename(left)
            before.rename(run.checkpoints)


def take_back(run: RunDir, plan: Plan) -> Plan:
    """The plan of before the last growth, which did not pay; the run stands there again."""
    number = max(i for i, growth in enumerate(plan.growths, start=1) if growth.kept)
    before = read_plan(RunDir(folder_of(run, number)))
    growths = [
        replace(one, kept=False) if i == number else one for i, one in enumerate(plan.growths, start=1)
    ]
    restored = replace(before, growths=tuple(growths))
    write_sealed(run.path / "plan.json", restored.to_json())
    settle_growths(run, restored)
    return restored


def with_growth(plan: Plan, growth: Growth) -> Plan:
    """The plan with one growth more."""
    return replace(plan, growths=(*plan.growths, growth))
