"""Growth in a run directory: old checkpoints are set aside, those of the grown adapter take their place.

plan.json is the point of no return: a kill before it leaves the run as it was, one after it continues with
the growth, by `apply_growths`. The same holds for taking a growth back.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.plan import Plan, read_plan
from peftkit.plan.plan import Growth
from peftkit.rundir import MANIFEST, RunDir, publish_folder, read_json, write_json, write_sealed

if TYPE_CHECKING:
    from peftkit.train.checkpoint.snapshot import Tensors

_MANIFEST_FACTS = ("fingerprints", "num_rollbacks", "samples_seen")


def growth_folder(run: RunDir, number: int) -> Path:
    """Return the folder in which growth `number` (from 1) keeps the plan and checkpoints of before."""
    return run.path / "growths" / str(number)


def write_growth(
    run: RunDir, before: Plan, after: Plan, *, checkpoint: Path, trained: Tensors, optimizer: Mapping[str, Any]
) -> None:
    """Write the growth of a run from `before`, at a checkpoint, to `after`, whose last growth this is.

    `trained` are the tensors of the new checkpoint; `optimizer` is the state of its optimizer, empty where that starts
    anew.
    """
    from safetensors.torch import save_file

    folder = growth_folder(run, len(after.growths))
    if folder.exists():
        shutil.rmtree(folder)  # of a try that was killed before it counted
    folder.mkdir(parents=True)
    write_sealed(folder / "plan.json", before.to_json())
    state, trainer = (read_json(checkpoint / name) for name in ("state.json", "trainer_state.json"))
    manifest = read_json(checkpoint / MANIFEST)
    facts = {key: manifest[key] for key in _MANIFEST_FACTS if key in manifest}
    tensors = {k: v for k, v in optimizer.items() if hasattr(v, "shape")}
    values = {k: v for k, v in optimizer.items() if not hasattr(v, "shape")}
    with publish_folder(folder / "grown" / checkpoint.name, step=trainer["global_step"], **facts) as staging:
        for stem, group in (("trained", trained), ("optimizer", tensors)):
            copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in group.items()}
            save_file(copies, staging / f"{stem}.safetensors")
        shutil.copyfile(checkpoint / "random.safetensors", staging / "random.safetensors")
        # losses of before say nothing of the grown adapter: the best is searched anew
        progress = {**state["progress"], "best_loss": None, "best_step": None}
        progress |= {"earlier_loss": None, "earlier_step": None, "num_without_gain": 0, "patience_loss": None}
        # the next step's rate: as the schedule goes on, or the zero from which one that begins anew warms up
        schedule, restarts = state["schedule"], after.train.restart_step == trainer["global_step"]
        rates, last_rates = (
            [after.train.learning_rate * (rate / before.train.learning_rate) for rate in schedule[key]]
            for key in ("base_lrs", "_last_lr")
        )
        schedule |= {"base_lrs": rates, "_last_lr": [0.0 for _ in rates] if restarts else last_rates}
        # the losses of another adapter: a new one begins at the base's, which would be a spike
        vitals = {} if after.growths[-1].is_new_start else state["vitals"]
        as_grown = {**state, "vitals": vitals, "schedule": schedule, "optimizer": dict(values), "progress": progress}
        write_json(staging / "state.json", as_grown)
        write_json(staging / "trainer_state.json", {**trainer, "max_steps": after.train.num_steps})
    write_sealed(run.path / "plan.json", after.to_json())
    apply_growths(run, after)


def apply_growths(run: RunDir, plan: Plan) -> None:
    """Move checkpoints to where the plan says they belong. Idempotent."""
    for number, growth in enumerate(plan.growths, start=1):
        folder = growth_folder(run, number)
        earlier_checkpoints, grown_checkpoints, discarded = (folder / "checkpoints", folder / "grown", folder / "left")
        if growth.kept and grown_checkpoints.exists():
            if not earlier_checkpoints.exists() and run.checkpoints.exists():
                run.checkpoints.rename(earlier_checkpoints)
            grown_checkpoints.rename(run.checkpoints)
        if not growth.kept and earlier_checkpoints.exists():
            if not discarded.exists() and run.checkpoints.exists():
                run.checkpoints.rename(discarded)
            earlier_checkpoints.rename(run.checkpoints)


def take_back_growth(run: RunDir, plan: Plan, *, step: int = 0) -> Plan:
    """Revert the last kept growth at the look of a step: restore its earlier plan and checkpoints; return that plan."""
    number = max(i for i, growth in enumerate(plan.growths, start=1) if growth.kept)
    before = read_plan(RunDir(growth_folder(run, number)))
    growths = [
        replace(growth_entry, kept=False, undone_step=step) if i == number else growth_entry
        for i, growth_entry in enumerate(plan.growths, start=1)
    ]
    restored = replace(before, growths=tuple(growths), ranks=plan.ranks)
    write_sealed(run.path / "plan.json", restored.to_json())
    apply_growths(run, restored)
    return restored


def add_growth(plan: Plan, growth: Growth) -> Plan:
    """Return the plan with one more growth."""
    return replace(plan, growths=(*plan.growths, growth))
