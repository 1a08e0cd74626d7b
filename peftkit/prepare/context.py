"""The context of a run before it trains: recipe, facts, data, plan, and the files that record them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import interrupt
from peftkit.data.rows.examples import Examples
from peftkit.data.rows.ingest import read_examples
from peftkit.data.tokens.prepare import TokenizedData
from peftkit.errors import UserError
from peftkit.model.hardware import detect_device
from peftkit.model.load import resolve_source
from peftkit.plan import Facts, Plan, read_plan
from peftkit.plan.advice import WARNING
from peftkit.plan.resolve import unquantized_base
from peftkit.prepare.data_check import PreparedData, prepare_data
from peftkit.prepare.environment import environment, fingerprints, resolved_text
from peftkit.prepare.facts import memory_problems, model_facts, with_converted_config, with_ranks
from peftkit.prepare.start import require_start
from peftkit.prepare.traced_memory import plan_with_traced_memory
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.paths import redact_url
from peftkit.rundir import RunDir, read_sealed, require_free_space, sha256_of, write_sealed, write_text
from peftkit.rundir.events import ChecksEvent, Event, Observer, PhaseEvent, WarningEvent
from peftkit.secrets import redact
from peftkit.units import show_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunContext:
    """The context of a run, passed between the steps of a training."""

    run: RunDir
    loaded: LoadedRecipe
    facts: Facts
    config: Mapping[str, Any]
    plan: Plan
    source: str
    prepared_data: PreparedData
    observer: Observer
    started: float

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.prepared_data.tokenizer

    @property
    def prepared(self) -> TokenizedData:
        return self.prepared_data.prepared

    def fingerprints(self) -> dict[str, Any]:
        """Return the fingerprints of recipe, data, base and versions as they are now."""
        return fingerprints(self.loaded, self.source, self.plan.base, self.tokenizer, self.prepared)

    def emit(self, event: Event) -> None:
        """Write an event with its time, and pass it to the observer."""
        seconds = round(time.monotonic() - self.started, 3)
        self.observer(self.run.emit(replace(event, at_seconds=seconds)))


def write_recipe(loaded: LoadedRecipe, run: RunDir) -> None:
    """Write the recipe as resolved and as given, without secrets; from then on the folder is a run."""
    resolved = resolved_text(loaded)
    write_text(run.path / "resolved.yaml", resolved)
    write_text(run.path / "recipe.yaml", redact(loaded.text) or resolved)


def write_plan_files(context: RunContext) -> None:
    """Write the data report, the environment and the plan: plan.json last."""
    write_sealed(context.run.path / "data.json", context.prepared_data.report.to_json())
    write_environment(context)
    write_sealed(context.run.path / "plan.json", context.plan.to_json())


def write_environment(context: RunContext) -> None:
    """Write environment.json: versions, device and fingerprints that hold from here on."""
    file_sha256 = sha256_of(context.run.path / "recipe.yaml")
    content = environment(context.facts.device, context.fingerprints(), context.loaded)
    write_sealed(context.run.path / "environment.json", {**content, "recipe_file_sha256": file_sha256})


def record_weights(context: RunContext) -> None:
    """Write environment.json again where the weights were downloaded only now."""
    old_fingerprints = read_sealed(context.run.path / "environment.json")["fingerprints"]
    if not old_fingerprints["base"]["weights_sha256"]:
        write_environment(context)


def prepare_run(
    loaded: LoadedRecipe, facts: Facts, examples: Examples | None, base: Any, run: RunDir, observer: Observer
) -> RunContext:
    """Prepare a run: tokenizer and data first, so that bad data costs no model load; then the plan.

    A run that has a plan keeps it. Raises UserError for bad data, and for what does not fit.
    """
    start_time = time.monotonic()
    source = resolve_source(base, loaded.where(("base", "id")))
    interrupt.stop_if_requested("interrupted before training")
    is_planned = (run.path / "plan.json").exists()
    examples = read_examples(loaded) if examples is None else examples
    if loaded.recipe.start_from is not None and not is_planned:
        base_plan = unquantized_base(
            facts.model.shape, id=base.id, kind=base.kind, revision=loaded.recipe.base.revision, dtype="float32"
        )
        require_start(loaded, source, base_plan, examples.labels, observer)
    plan_device = facts.device.kind
    full_base = with_converted_config(base, source)
    facts = with_ranks(loaded, Facts(detect_device(), model_facts(loaded, full_base, examples), None))
    names = ", ".join(Path(redact_url(source.path)).name for source in loaded.recipe.data.sources)
    observer(PhaseEvent(name="data", detail=names))
    if facts.device.kind != plan_device:
        text = f"the driver shows a {plan_device} device, but torch uses {facts.device.name}"
        observer(WarningEvent(text=f"{text}: is the right torch installed?"))
    prepared_data = prepare_data(loaded, facts, examples, source)
    facts, plan = prepared_data.facts, prepared_data.plan
    observer(ChecksEvent(verdict=prepared_data.report.verdict, batching=prepared_data.report.totals.batching))
    for finding in prepared_data.report.findings:
        if finding.status in {"warn", "waived"}:
            prefix = "waived: " if finding.status == "waived" else ""
            observer(WarningEvent(text=f"{prefix}{finding.check}: {finding.said}"))
    if prepared_data.report.failed:
        raise UserError(prepared_data.report.problems())
    context = RunContext(run, loaded, facts, full_base.config or {}, plan, source, prepared_data, observer, start_time)
    if is_planned:
        require_disk_space(plan, run)
        return replace(context, plan=read_plan(run))
    plan, note = plan_with_traced_memory(loaded, facts, plan, full_base.config or {})
    if note:
        observer(WarningEvent(text=note))
    for decision in plan.decisions:
        if decision.key.startswith(WARNING):
            text = f"{decision.key.removeprefix(WARNING)} {decision.value}: {decision.reason}"
            observer(WarningEvent(text=text))
    if problems := memory_problems(loaded, plan, facts, slack=1.0):
        raise UserError(problems)
    require_disk_space(plan, run)
    return replace(context, plan=plan)


_NUM_CHECKPOINTS = 3  # the newest two, and the one being written; one more where there is a best
_FP32_BYTES = 4
_OVERHEAD_FACTOR = 1.02  # headers, logs
_TOKENIZER_BYTES = 2**24  # beside the result


def checkpoint_bytes(plan: Plan) -> int:
    """Return the bytes of a checkpoint: trained tensors in fp32, and the optimizer's states."""
    peaks = plan.memory.peaks if plan.memory else ()
    states = max((peak.components.get("optimizer", 0) for peak in peaks), default=0)
    return (plan.method.num_trainable or 0) * _FP32_BYTES + states


def run_bytes(plan: Plan) -> int:
    """Return the largest size of a run's folder in bytes: checkpoints, and the adapter or full model."""
    steps, interval = plan.train.num_steps or 1, plan.train.checkpoint_steps
    has_best = plan.batch is not None and plan.batch.eval_rows > 0
    num_checkpoints = min(_NUM_CHECKPOINTS + has_best, math.ceil(steps / interval) + 1)
    result = (plan.method.num_trainable or 0) * _FP32_BYTES + _TOKENIZER_BYTES
    return round(_OVERHEAD_FACTOR * (num_checkpoints * checkpoint_bytes(plan) + result))


def require_disk_space(plan: Plan, run: RunDir) -> None:
    """Raise UserError where the run's disk has less free than the run will still write."""
    folders = [run.checkpoint(step) for step in run.checkpoint_steps()]
    written_bytes = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    content = f"checkpoints of {show_bytes(checkpoint_bytes(plan))} and the result"
    fix = "make room, or choose another --out"
    require_free_space(run.path, run_bytes(plan) - written_bytes, what=content, fix=fix)
