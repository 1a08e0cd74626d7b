"""The report of `peftkit plan` before anything is loaded: parameters, memory, fit, nearest changes, time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from peftkit.data.tokens.lengths import count_lengths, longest_sides
from peftkit.data.tokens.prepare import tokenize_examples
from peftkit.errors import Problem, UserError
from peftkit.model.hardware import is_out_of_memory
from peftkit.model.load import load_tokenizer, read_stop_ids, resolve_source
from peftkit.plan import DeviceFacts, Facts, Memory, Plan, make_plan
from peftkit.plan.changes import Change, nearest_changes
from peftkit.plan.devices import parse_device
from peftkit.plan.fit import Fit, check_fit
from peftkit.plan.inspection import unread_keys_note
from peftkit.plan.throughput import RunCost, estimate_cost, flops_per_token, speed_key
from peftkit.prepare.calibration import add_run, read_calibration
from peftkit.prepare.facts import find_base, light_config, light_facts
from peftkit.prepare.measured_memory import MeasuredMemory, measure_memory
from peftkit.prepare.out_of_memory import find_shortage
from peftkit.prepare.traced_memory import plan_with_traced_memory
from peftkit.prepare.vocabulary import require_tokens_of_folder
from peftkit.recipe import LoadedRecipe
from peftkit.units import html_table, show_bytes, show_count, show_seconds

_MIN_SHOWN_BYTES = 2**20  # smaller components are left out of the table
# Which line of a recipe drives a component.
RECIPE_KEYS: Mapping[str, str] = {
    "base weights": "base.id and method.name",
    "adapter": "method.rank and method.targets",
    "gradients": "method.name",
    "buckets": "devices.count",
    "optimizer": "train.optimizer",
    "activations": "train.micro_batch, train.max_length, train.gradient_checkpointing",
    "recomputed layer": "train.micro_batch and train.max_length",
    "logits and loss": "train.micro_batch and train.max_length",
    "temporaries": "train.precision and train.max_length",
    "cache": "evaluate.max_new_tokens",
}
# How each component is known: counted from shapes, worked out by rules or replayed, or taken as usual.
BASIS: Mapping[str, tuple[str, str]] = {
    "base weights": ("derived", "measured"),
    "adapter": ("derived", "measured"),
    "gradients": ("derived", "measured"),
    "optimizer": ("derived", "derived"),
    "buckets": ("derived", "derived"),
    "activations": ("derived", "measured"),
    "recomputed layer": ("derived", "measured"),
    "logits and loss": ("derived", "measured"),
    "temporaries": ("derived", "measured"),
    "buffers": ("derived", "measured"),
    "batch": ("derived", "measured"),
    "cache": ("derived", "derived"),
    "workspaces": ("assumed", "assumed"),
}


@dataclass(frozen=True)
class Account:
    """A plan with its peak memory, its fit on a device, the nearest changes that fit, and its cost."""

    plan: Plan
    device: DeviceFacts
    fit: Fit
    changes: tuple[Change, ...]
    work: RunCost
    assumptions: tuple[str, ...]
    num_parameters: int
    lengths_are_bounds: bool = False  # of the rows: bytes were counted, not tokens
    measured_memory: MeasuredMemory | None = None

    @property
    def memory(self) -> Memory:
        assert self.plan.memory is not None
        return self.plan.memory

    @property
    def num_total(self) -> int:
        """Return the number of parameters of the base and of the adapter."""
        num_added = (self.plan.method.num_trainable or 0) if self.plan.method.peft else 0
        return self.num_parameters + num_added

    @property
    def place(self) -> str:
        """Return the device by name, as one of several where each process has its own."""
        num, is_shared = self.plan.ranks.num, self.device.kind != "cuda"
        whose = f"each of {num} processes on " if is_shared else f"each of {num} "
        return f"{whose if num > 1 else ''}{self.device.name}"

    @property
    def headline(self) -> str:
        """Return the plan in one line: whether it fits, how much of how much, steps and time."""
        is_bound = self.memory.depth != "traced" and self.lengths_are_bounds
        memory = f"{show_bytes(self.fit.needed_bytes)} of {show_bytes(self.fit.free_bytes)}"
        steps = f"{show_count(self.plan.train.num_steps)} steps" if self.plan.train.num_steps else "steps unknown"
        time = f", {'at most ' if is_bound else 'about '}{show_seconds(self.work.seconds)}" if self.work.seconds else ""
        unproven = (
            "; memory on a GPU is predicted and was never compared with one" if self.device.kind == "cuda" else ""
        )
        needed = f"{'at most ' if is_bound else ''}{memory} on {self.place}"
        return f"{self.fit.verdict}: needs {needed}; {steps}{time}{unproven}"

    @property
    def driver(self) -> str:
        """Return the recipe keys behind the largest component of the peak that can be changed."""
        driven = {n: s for n, s in self.memory.peak.components.items() if n in RECIPE_KEYS}
        others = {n: s for n, s in driven.items() if n != "base weights"}
        largest = max(others, key=lambda name: others[name], default="base weights")
        if driven.get("base weights", 0) > 4 * others.get(largest, 0):
            largest = "base weights"
        return f"{largest}: {RECIPE_KEYS[largest]}"

    def basis(self, component: str) -> str:
        """Return how a component is known: measured by the trace, derived or assumed."""
        return BASIS.get(component, ("derived", "measured"))[self.memory.depth == "traced"]

    def memory_rows(self) -> list[tuple[str, str, str, str]]:
        """Return table rows of the peak and what comes on top of it.

        Columns: component, size, how it is known, and the recipe keys that change it.
        """
        memory, peak = self.memory, self.memory.peak
        rows = [
            (name, show_bytes(size), self.basis(name), RECIPE_KEYS.get(name, ""))
            for name, size in sorted(peak.components.items(), key=lambda item: -item[1])
            if size >= _MIN_SHOWN_BYTES
        ]
        on_gpu = self.plan.device == "cuda"
        rows.append(("allocated", show_bytes(peak.allocated_bytes), f"in the {peak.phase}", ""))
        reserve = memory.reserved_bytes - peak.allocated_bytes
        if reserve:
            source = "replayed" if memory.depth == "traced" and on_gpu else "assumed"
            rows.append(("allocator reserve", show_bytes(reserve), source, ""))
        context_name = "CUDA context" if on_gpu else "Python and its libraries"
        rows.append((context_name, show_bytes(memory.context_bytes), "assumed", ""))
        rows.append(("needed", show_bytes(memory.needed_bytes), memory.depth, ""))
        if memory.host_bytes:
            rows.append(("optimizer states on the host", show_bytes(memory.host_bytes), "derived", ""))
        return rows

    @property
    def verdict(self) -> str:
        """Return one sentence: whether the plan fits on the device, and the margin in bytes."""
        margin = show_bytes(abs(self.fit.margin_bytes))
        label = "missing" if self.fit.margin_bytes < 0 else "left"
        location = f"{self.place} with {show_bytes(self.fit.free_bytes)} free"
        return f"{self.fit.verdict} on {location}: {margin} {label}"

    def _repr_html_(self) -> str:
        return f"{html_table(self.memory_rows())}<p>{escape(self.verdict)}</p>"

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        memory = self.memory
        return {
            "trainable": self.plan.method.num_trainable,
            "total": self.num_total,
            "by_role": dict(self.plan.method.trainable_by_role or {}),
            "by_layers": dict(self.plan.method.trainable_by_layers),
            "device": asdict(self.device),
            "fit": {**asdict(self.fit), "margin_bytes": self.fit.margin_bytes},
            "memory": {
                **asdict(memory),
                "peak_bytes": memory.peak.allocated_bytes,
                "peak_phase": memory.peak.phase,
                "needed_bytes": memory.needed_bytes,
                "basis": {name: self.basis(name) for name in memory.peak.components},
            },
            "batch": asdict(self.plan.batch) if self.plan.batch else None,
            "driver": self.driver,
            "changes": [asdict(change) for change in self.changes],
            "work": asdict(self.work),
            "trial": self.measured_memory
            and {**asdict(self.measured_memory), "error_percent": self.measured_memory.error_percent},
            "assumed": list(self.assumptions),
            "decisions": [asdict(decision) for decision in self.plan.decisions],
        }


def plan_report(loaded: LoadedRecipe, *, gpu: str = "this", trace: bool = False, measure: bool = False) -> Account:
    """Return the plan report of a recipe on a device, without loading weights.

    `gpu` is a name, a size or `this`. With `trace` the real code runs on the meta device, and rows are
    counted in tokens where the base's tokenizer can be loaded. With `measure` a few steps are also run on
    this device, with random weights. Raises UserError for what the user can fix.
    """
    if measure and gpu != "this":
        fix = "drop --gpu or --measure"
        raise UserError(Problem("command line", f"--measure with --gpu {gpu}", "this device", fix))
    trace = trace or measure
    facts, examples = light_facts(loaded)
    device, device_note = parse_device(gpu, facts.device)
    facts = replace(facts, device=device, num_devices=facts.num_devices if gpu == "this" else None)
    plan = make_plan(loaded, facts)
    require_tokens_of_folder(loaded, plan)
    config = light_config(loaded)
    notes: list[str] = [] if trace else unread_keys_note(facts.model.shape)
    if trace:
        if examples is not None:
            facts, note = _count_tokens(loaded, facts, plan, examples)
            notes += [note] if note else []
            plan = make_plan(loaded, facts)
        plan, note = plan_with_traced_memory(loaded, facts, plan, config)
        notes += [f"{note}: the closed-form estimate is used"] if note else []
    assert plan.memory is not None
    if plan.memory.bound:
        notes.append(plan.memory.bound + ("" if trace else ": --trace gives the exact number"))
    fit = check_fit(plan.memory, facts.device)
    changes = nearest_changes(loaded, facts, plan) if fit.verdict == "does not fit" else []
    trial = None
    if measure and facts.device.kind == "mps":
        notes.append("not measured: torch reports no peak memory for this device")
    elif measure and fit.verdict == "does not fit":
        notes.append("not measured: it does not fit on this device")
    elif measure:
        trial, note = _measure_on_device(plan, facts, config)
        notes += [note] if note else []
    speeds = read_calibration().speeds.get(facts.device.name, {})
    hourly_price = loaded.recipe.devices.price_per_hour
    assumptions = [device_note] if device_note else []
    lengths = facts.data.lengths if facts.data else None
    if lengths is None:
        text = f"no data was read: every row is assumed to have {plan.data.max_length} tokens (train.max_length)"
        assumptions.append(text)
    elif lengths.source != "counted":
        max_tokens = plan.batch.num_tokens if plan.batch else 0
        assumptions.append(f"rows are at most {max_tokens} tokens long, by their bytes (--trace counts tokens)")
    if lengths is not None and lengths.longest[0].num_tokens > plan.data.max_length:
        assumptions.append(f"rows of more than {plan.data.max_length} tokens are dropped or cut (data.truncation)")
    if facts.device.used_bytes > 0.25 * facts.device.memory_bytes:
        used, total = show_bytes(facts.device.used_bytes), show_bytes(facts.device.memory_bytes)
        assumptions.append(f"{used} of the device's {total} are in use by other processes")
    return Account(
        plan=plan,
        device=facts.device,
        fit=fit,
        changes=tuple(changes),
        work=estimate_cost(facts.model.shape, plan, facts, speeds, hourly_price),
        assumptions=(*assumptions, *notes),
        num_parameters=facts.model.shape.num_parameters,
        lengths_are_bounds=lengths is not None and lengths.source != "counted",
        measured_memory=trial,
    )


def _measure_on_device(plan: Plan, facts: Facts, config: Mapping[str, object]) -> tuple[MeasuredMemory | None, str]:
    """Run three real steps on this device and record its speed; or return None and the reason."""
    assert plan.batch is not None
    shape, batch = facts.model.shape, plan.batch
    try:
        trial = measure_memory(plan, config, batch, vocab=shape.dims.vocab)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        shortage = find_shortage(error, step=None, occupied_bytes=0)
        return None, f"not measured: the device ran out of memory in the {shortage.phase}"
    token_flops = flops_per_token(shape, plan, batch.num_tokens)
    tokens = batch.num_rows * batch.num_tokens * min(2, plan.train.accumulation)
    add_run(
        facts.device.name,
        speed_key(plan),
        flops_per_second=token_flops * tokens / trial.step_seconds,
        memory={
            "depth": plan.memory.depth if plan.memory else "",
            **asdict(trial),
            "error_percent": round(trial.error_percent, 2),
        },
    )
    return trial, ""


def _count_tokens(loaded: LoadedRecipe, facts: Facts, plan: Plan, examples: Any) -> tuple[Facts, str]:
    """Return the facts with row lengths in tokens; or the same facts and why they were not counted."""
    try:
        source = resolve_source(find_base(loaded), loaded.where(("base", "id")), need_weights=False)
        tokenizer = load_tokenizer(source, plan.base)
    except UserError as error:
        return facts, f"tokens not counted: the tokenizer could not be loaded: {error.problems[0].got}"
    task = facts.model.shape.task
    prepared = tokenize_examples(
        examples, tokenizer, plan.data, task=task, labels=plan.base.labels, stops=read_stop_ids(source, tokenizer)
    )
    assert facts.data is not None
    lengths = count_lengths(prepared.train, task, plan.data.max_length)
    held_out = longest_sides(count_lengths(prepared.eval, task))
    return replace(facts, data=replace(facts.data, lengths=lengths, longest_eval=held_out)), ""
