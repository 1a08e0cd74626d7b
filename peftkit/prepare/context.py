"""What a run stands on before it trains: recipe, facts, data, plan, and the files that say so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.data.gate.report import DataReport
from peftkit.data.rows.examples import Examples
from peftkit.data.rows.ingest import read
from peftkit.data.tokens.prepare import Prepared
from peftkit.errors import UserError
from peftkit.plan import Facts, Plan, read_plan
from peftkit.prepare.data_check import Looked, look
from peftkit.prepare.environment import environment, fingerprints, resolved_text
from peftkit.prepare.facts import converted, memory_problems, model_facts
from peftkit.prepare.traced_memory import settle
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.paths import shown
from peftkit.rundir import RunDir, read_sealed, refuse_without_room, sha256_of, write_sealed, write_text
from peftkit.secrets import redact
from peftkit.units import show_bytes

Observer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Stage:
    """What the steps of the flow hand to each other."""

    run: RunDir
    loaded: LoadedRecipe
    facts: Facts
    config: Mapping[str, Any]
    plan: Plan
    source: str
    looked: Looked
    observer: Observer
    started: float

    @property
    def tokenizer(self) -> Any:
        return self.looked.tokenizer

    @property
    def prepared(self) -> Prepared:
        return self.looked.prepared

    def fingerprints(self) -> dict[str, Any]:
        """Of recipe, data, base and versions, as they are now."""
        return fingerprints(self.loaded, self.source, self.plan.base, self.tokenizer, self.prepared)

    def emit(self, event: str, **fields: Any) -> None:
        """Write an event and show it."""
        self.observer(self.run.emit(event, at_seconds=round(time.monotonic() - self.started, 3), **fields))


def write_recipe(loaded: LoadedRecipe, run: RunDir) -> None:
    """The recipe as resolved and as given, without secrets: what makes a folder a run from the start."""
    resolved = resolved_text(loaded)
    write_text(run.path / "resolved.yaml", resolved)
    write_text(run.path / "recipe.yaml", redact(loaded.text) or resolved)


def write_decided(stage: Stage) -> None:
    """What the gate said, with what the run is made, and what was decided: plan.json last."""
    write_sealed(stage.run.path / "data.json", stage.looked.report.to_json())
    write_environment(stage)
    write_sealed(stage.run.path / "plan.json", stage.plan.to_json())


def write_environment(stage: Stage) -> None:
    """With what the run is made from here on."""
    given = sha256_of(stage.run.path / "recipe.yaml")
    found = environment(stage.facts.device, stage.fingerprints(), stage.loaded)
    write_sealed(stage.run.path / "environment.json", {**found, "recipe_file_sha256": given})


def note_weights(stage: Stage) -> None:
    """Write with what the run is made once more where a hub's weights have come only now."""
    before = read_sealed(stage.run.path / "environment.json")["fingerprints"]
    if not before["base"]["weights_sha256"]:
        write_environment(stage)


def open_stage(
    loaded: LoadedRecipe, facts: Facts, examples: Examples | None, base: Any, run: RunDir, observer: Observer
) -> Stage:
    """Tokenizer and data first, so that bad data costs no model load; then the plan for the rows left.

    A run that was planned keeps its plan. Raises UserError for bad data, and for what does not fit.
    """
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import loadable

    started = time.monotonic()
    source = loadable(base, loaded.where(("base", "id")))
    interrupt.stop_if_requested("interrupted before training")
    examples = read(loaded) if examples is None else examples
    plan_device = facts.device.kind
    whole = converted(base, source)
    facts = Facts(detect_device(), model_facts(loaded, whole, examples), None)
    names = ", ".join(Path(shown(source.path)).name for source in loaded.recipe.data.sources)
    observer({"event": "phase", "name": "data", "detail": names})
    if facts.device.kind != plan_device:
        text = f"the driver shows a {plan_device} device, but torch uses {facts.device.name}"
        observer({"event": "warning", "text": f"{text}: is the right torch installed?"})
    looked = look(loaded, facts, examples, source)
    facts, plan = looked.facts, looked.plan
    _tell_report(looked.report, observer)
    stage = Stage(run, loaded, facts, whole.config or {}, plan, source, looked, observer, started)
    if (run.path / "plan.json").exists():
        refuse_a_full_disk(plan, run)
        return replace(stage, plan=read_plan(run))
    plan, note = settle(loaded, facts, plan, whole.config or {})
    if note:
        observer({"event": "warning", "text": note})
    if problems := memory_problems(loaded, plan, facts, slack=1.0):
        raise UserError(problems)
    refuse_a_full_disk(plan, run)
    return replace(stage, plan=plan)


def _tell_report(report: DataReport, observer: Observer) -> None:
    """What the data gate says. Raises UserError where a check fails that is not waived."""
    observer({"event": "checks", "verdict": report.verdict, "batching": report.totals.batching})
    for finding in report.findings:
        if finding.status in {"warn", "waived"}:
            word = "waived: " if finding.status == "waived" else ""
            observer({"event": "warning", "text": f"{word}{finding.check}: {finding.said}"})
    if report.failed:
        raise UserError(report.problems())


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
