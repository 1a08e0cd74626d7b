"""The ranks of a run before its first step: the lead tells where it is, the others follow, and all must be alike."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

from peftkit import ranks
from peftkit.errors import Problem, UserError
from peftkit.plan import read_plan
from peftkit.prepare.context import RunContext, prepare_run
from peftkit.prepare.environment import find_changes
from peftkit.prepare.facts import light_facts, require_runnable
from peftkit.recipe import LoadedRecipe
from peftkit.report import read_summary
from peftkit.run.stations import Finished, Segment
from peftkit.rundir import RunDir
from peftkit.rundir.events import WarningEvent, ignore_event


def num_to_launch(loaded: LoadedRecipe) -> int:
    """Return the number of processes that have to be started for a recipe; 0 if this one will do, or is of a launch."""
    count = loaded.recipe.devices.count
    return count if isinstance(count, int) and count > 1 and ranks.launched().num == 1 else 0


def lead(segment: Segment) -> Segment:
    """Tell the other ranks of the run, and return the segment once all of them are ready for it."""
    context, checkpoint = segment.context, segment.checkpoint
    if context.loaded.recipe.devices.restarts and os.environ.get("TORCHELASTIC_RUN_ID") != ranks.LAUNCH_ID:
        text = "devices.restarts is for processes started by --gpus: this launcher restarts them itself, or does not"
        context.emit(WarningEvent(text=text))
    ranks.from_lead(lambda: [str(context.run.path.resolve()), str(checkpoint or ""), False])
    require_alike(context)
    return segment


def on_any_ranks(loaded: LoadedRecipe) -> LoadedRecipe:
    """Return the recipe of a planned run as one for as many processes as there are now."""
    devices = loaded.recipe.devices.model_copy(update={"count": "auto", "restarts": 0})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"devices": devices}))


def follow(loaded: LoadedRecipe) -> Segment | Finished:
    """Return the segment to train along in, of the run that the lead made: it is read, and nothing written."""
    path, checkpoint, is_complete = ranks.from_lead(lambda: None)
    run = RunDir(Path(path), is_read_only=True)
    if is_complete:
        return Finished(read_summary(run))
    if not (run.path / "plan.json").exists():
        got = f"nothing on rank {ranks.current().rank} ({socket.gethostname()})"
        fix = "give --out a folder that all machines share"
        raise UserError(Problem(str(run.path), got, "the run of rank 0", fix))
    of_now = on_any_ranks(loaded)
    facts, examples = light_facts(of_now)
    base = require_runnable(of_now, read_plan(run), facts)
    context = replace(prepare_run(of_now, facts, examples, base, run, ignore_event), loaded=loaded)
    require_alike(context)
    return Segment(context, Path(checkpoint) if checkpoint else None)


def require_alike(context: RunContext) -> None:
    """Raise UserError on all ranks where recipe, data, base, versions or device of one differ from the lead's."""
    if ranks.current().num == 1:
        return
    own = {"fingerprints": context.fingerprints(), "device": context.facts.device.name}
    everyone = ranks.gathered(json.loads(json.dumps(own)))

    def compare() -> None:
        problems = []
        for rank, other in enumerate(everyone[1:], start=1):
            changes = find_changes(everyone[0]["fingerprints"], other["fingerprints"])
            if other["device"] != everyone[0]["device"]:
                changes["device"] = f"{everyone[0]['device']} on rank 0, {other['device']} there"
            fix = "give all ranks the same files and packages"
            problems += [
                Problem(f"rank {rank}", f"{key} other than rank 0's ({detail})", "the same on all ranks", fix)
                for key, detail in changes.items()
            ]
        if problems:
            raise UserError(problems)

    ranks.from_lead(compare)
