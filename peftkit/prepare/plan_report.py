"""What `peftkit plan` tells before anything is loaded: parameters, memory, fit, nearest changes, time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.plan import DeviceFacts, Facts, Memory, Plan, make_plan
from peftkit.plan.changes import Change, nearest_changes
from peftkit.plan.devices import device_of
from peftkit.plan.fit import Fit, judge
from peftkit.plan.throughput import Work, flops_per_token, speed_key, work_of
from peftkit.prepare.calibration import add_run, read_calibration
from peftkit.prepare.facts import light_config, light_facts
from peftkit.prepare.measured_memory import Trial, run_trial
from peftkit.prepare.out_of_memory import shortage_of
from peftkit.prepare.traced_memory import settle
from peftkit.recipe import LoadedRecipe
from peftkit.units import html_table, show_bytes

_SHOWN_BYTES = 2**20  # smaller components are left out of the table
# Which line of a recipe drives a component.
DRIVERS: Mapping[str, str] = {
    "base weights": "base.id and method.name",
    "adapter": "method.rank and method.targets",
    "gradients": "method.name",
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
    """A plan with its memory, its fit on a device, and what it takes otherwise."""

    plan: Plan
    device: DeviceFacts
    fit: Fit
    changes: tuple[Change, ...]
    work: Work
    assumed: tuple[str, ...]
    num_parameters: int
    trial: Trial | None = None

    @property
    def memory(self) -> Memory:
        assert self.plan.memory is not None
        return self.plan.memory

    @property
    def num_total(self) -> int:
        """Parameters of the base and of what is added to it."""
        added = (self.plan.method.num_trainable or 0) if self.plan.method.peft else 0
        return self.num_parameters + added

    @property
    def driver(self) -> str:
        """The recipe's line behind the largest part of the peak that can be changed."""
        parts = {n: s for n, s in self.memory.peak.components.items() if n in DRIVERS}
        rest = {n: s for n, s in parts.items() if n != "base weights"}
        largest = max(rest, key=lambda name: rest[name], default="base weights")
        if parts.get("base weights", 0) > 4 * rest.get(largest, 0):
            largest = "base weights"
        return f"{largest}: {DRIVERS[largest]}"

    def basis(self, component: str) -> str:
        """Whether a component is measured by the trace, derived or assumed."""
        return BASIS.get(component, ("derived", "measured"))[self.memory.depth == "traced"]

    def memory_rows(self) -> list[tuple[str, str, str, str]]:
        """(component, size, how it is known, the recipe's line) at the peak, and what comes on top."""
        memory, peak = self.memory, self.memory.peak
        rows = [
            (name, show_bytes(size), self.basis(name), DRIVERS.get(name, ""))
            for name, size in sorted(peak.components.items(), key=lambda item: -item[1])
            if size >= _SHOWN_BYTES
        ]
        on_gpu = self.plan.device == "cuda"
        rows.append(("allocated", show_bytes(peak.allocated_bytes), f"in the {peak.phase}", ""))
        reserve = memory.reserved_bytes - peak.allocated_bytes
        if reserve:
            how = "replayed" if memory.depth == "traced" and on_gpu else "assumed"
            rows.append(("reserve of the allocator", show_bytes(reserve), how, ""))
        beside = "CUDA context" if on_gpu else "Python and its libraries"
        rows.append((beside, show_bytes(memory.context_bytes), "assumed", ""))
        rows.append(("needed", show_bytes(memory.needed_bytes), memory.depth, ""))
        if memory.host_bytes:
            rows.append(("optimizer states on the host", show_bytes(memory.host_bytes), "derived", ""))
        return rows

    @property
    def verdict(self) -> str:
        """One sentence: whether it fits where, and the margin."""
        margin = show_bytes(abs(self.fit.margin_bytes))
        left = "missing" if self.fit.margin_bytes < 0 else "left"
        where = f"{self.device.name} with {show_bytes(self.fit.free_bytes)} free"
        return f"{self.fit.verdict} on {where}: {margin} {left}"

    def _repr_html_(self) -> str:
        return f"{html_table(self.memory_rows())}<p>{escape(self.verdict)}</p>"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
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
            "trial": self.trial and {**asdict(self.trial), "error_percent": self.trial.error_percent},
            "assumed": list(self.assumed),
            "decisions": [asdict(decision) for decision in self.plan.decisions],
        }


def _assumptions(facts: Facts, plan: Plan, said: str) -> list[str]:
    assumed = [said] if said else []
    lengths = facts.data.lengths if facts.data else None
    if lengths is None:
        text = (
            f"no data was read: every row is taken to have {plan.data.max_length} tokens (train.max_length)"
        )
        assumed.append(text)
    elif lengths.source != "counted":
        most = plan.batch.num_tokens if plan.batch else 0
        assumed.append(f"rows are at most {most} tokens long, from their bytes (--trace counts tokens)")
    if lengths is not None and lengths.longest[0].num_tokens > plan.data.max_length:
        assumed.append(
            f"rows of more than {plan.data.max_length} tokens are dropped or cut (data.truncation)"
        )
    if facts.device.used_bytes > 0.25 * facts.device.memory_bytes:
        used, whole = show_bytes(facts.device.used_bytes), show_bytes(facts.device.memory_bytes)
        assumed.append(f"{used} of the device's {whole} are in use by others")
    return assumed


def account(
    loaded: LoadedRecipe, *, gpu: str = "this", trace: bool = False, measure: bool = False
) -> Account:
    """Everything about a recipe's plan on a device, without weights.

    `gpu` is a name, a size or `this`. With `trace` the real code runs on the meta device, and rows are
    counted in tokens where the base's tokenizer is at hand. With `measure` the plan is also tried here, with
    random weights. Raises UserError for what the user can mend.
    """
    if measure and gpu != "this":
        fix = "leave --gpu out, or --measure"
        raise UserError(Problem("command line", f"--measure with --gpu {gpu}", "a trial on this device", fix))
    trace = trace or measure
    facts, examples = light_facts(loaded)
    device, said = device_of(gpu, facts.device)
    facts = replace(facts, device=device)
    plan = make_plan(loaded, facts)
    config = light_config(loaded)
    notes: list[str] = []
    if trace:
        if examples is not None:
            facts, note = _counted(loaded, facts, plan, examples)
            notes += [note] if note else []
            plan = make_plan(loaded, facts)
        plan, note = settle(loaded, facts, plan, config)
        notes += [f"{note}: the closed form stands"] if note else []
    assert plan.memory is not None
    if plan.memory.bound:
        notes.append(plan.memory.bound + ("" if trace else ": --trace tells exactly"))
    fit = judge(plan.memory, facts.device)
    changes = nearest_changes(loaded, facts, plan) if fit.verdict == "does not fit" else []
    trial = None
    if measure and facts.device.kind == "mps":
        notes.append("not measured: torch tells no peak of this device's memory")
    elif measure and fit.verdict == "does not fit":
        notes.append("not measured: it does not fit here")
    elif measure:
        trial, note = _tried(plan, facts, config)
        notes += [note] if note else []
    speeds = read_calibration().speeds.get(facts.device.name, {})
    price = loaded.recipe.devices.price_per_hour
    return Account(
        plan=plan,
        device=facts.device,
        fit=fit,
        changes=tuple(changes),
        work=work_of(facts.model.shape, plan, facts, speeds, price),
        assumed=(*_assumptions(facts, plan, said), *notes),
        num_parameters=facts.model.shape.num_parameters,
        trial=trial,
    )


def _tried(plan: Plan, facts: Facts, config: Mapping[str, Any]) -> tuple[Trial | None, str]:
    """Three real steps on this device, which also teach its speed, or why there are none."""
    from peftkit.model.hardware import is_out_of_memory

    assert plan.batch is not None
    shape, batch = facts.model.shape, plan.batch
    try:
        trial = run_trial(plan, config, batch, vocab=shape.dims.vocab)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        shortage = shortage_of(error, step=None, occupied_bytes=0)
        return None, f"not measured: the device ran out of memory in the {shortage.phase}"
    work = flops_per_token(shape, plan, batch.num_tokens)
    tokens = batch.num_rows * batch.num_tokens * min(2, plan.train.accumulation)
    add_run(
        facts.device.name,
        speed_key(plan),
        flops_per_second=work * tokens / trial.step_seconds,
        memory={
            "depth": plan.memory.depth if plan.memory else "",
            **asdict(trial),
            "error_percent": round(trial.error_percent, 2),
        },
    )
    return trial, ""


def _counted(loaded: LoadedRecipe, facts: Facts, plan: Plan, examples: Any) -> tuple[Facts, str]:
    """Facts with the rows' lengths in tokens, or why they could not be counted."""
    from peftkit.data.tokens.lengths import counted, longest
    from peftkit.data.tokens.prepare import prepare
    from peftkit.model.load import load_tokenizer, loadable, stops_of
    from peftkit.prepare.facts import find_base

    try:
        source = loadable(find_base(loaded), loaded.where(("base", "id")))
        tokenizer = load_tokenizer(source, plan.base)
    except UserError as error:
        return facts, f"no tokens were counted, because no tokenizer is at hand: {error.problems[0].got}"
    task = facts.model.shape.task
    prepared = prepare(
        examples,
        tokenizer,
        plan.data,
        task=task,
        labels=plan.base.labels,
        stops=stops_of(source, tokenizer),
    )
    assert facts.data is not None
    lengths = counted(prepared.train, task, plan.data.max_length)
    held_out = longest(counted(prepared.eval, task))
    return replace(facts, data=replace(facts.data, lengths=lengths, longest_eval=held_out)), ""
