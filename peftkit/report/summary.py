"""The outcome of a run in numbers, read from its events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.diagnose.verdict import Verdict
from peftkit.plan.plan import read_plan
from peftkit.rundir import RunDir, read_sealed
from peftkit.rundir.events import (
    DoneEvent,
    EvalEvent,
    MemoryEvent,
    MetricEvent,
    ParametersEvent,
    StepEvent,
    VerdictEvent,
    last_of,
    of_type,
)
from peftkit.units import html_table, show_bytes, show_count, show_percent, show_seconds


@dataclass(frozen=True)
class Summary:
    """The outcome of a run: parameters, losses, metrics, time, memory. Losses are nats per trained token."""

    path: Path
    base: str
    method: str
    device: str
    num_steps: int
    num_trainable: int
    num_total: int
    trainable_by_role: Mapping[str, int]
    loss_first: float | None
    loss_last: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    metric: str | None
    metric_before: float | None
    metric_after: float | None
    num_metric_examples: int
    other_scores: Mapping[str, tuple[float, float]]  # the task's other metrics: before, after
    peak_bytes: Mapping[str, int]
    train_seconds: float
    total_seconds: float
    tokens_per_second: float | None
    result: Path | None
    memory: Mapping[str, Any]  # predicted and measured bytes of training, error in percent
    verdict: Verdict | None = None  # of the last look
    growths: tuple[str, ...] = ()  # each in words

    @property
    def next_commands(self) -> tuple[str, ...]:
        """Commands to run next with the result."""
        if self.result is None:
            return (f"peftkit resume {self.path}",)
        commands = (f"peftkit generate {self.path} 'your prompt'",)
        next_recipe = self.path / "next-recipe.yaml"
        return (*commands, f"peftkit finetune {next_recipe}") if next_recipe.is_file() else commands

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary as (name, value) rows for a table."""
        rows = [
            ("base", self.base),
            ("method", self.method),
            ("device", self.device),
            ("optimizer steps", show_count(self.num_steps)),
            (
                "trainable parameters",
                f"{show_count(self.num_trainable)} of {show_count(self.num_total)} "
                f"({show_percent(self.num_trainable / max(1, self.num_total))})",
            ),
        ]
        if self.loss_first is not None and self.loss_last is not None:
            rows.append(("training loss", f"{self.loss_first:.3f} -> {self.loss_last:.3f}"))
        if self.eval_loss_before is not None and self.eval_loss_after is not None:
            rows.append(("evaluation loss", f"{self.eval_loss_before:.3f} -> {self.eval_loss_after:.3f}"))
        if self.metric is not None and self.metric_before is not None and self.metric_after is not None:
            rows.append(
                (
                    f"{self.metric} ({self.num_metric_examples} held out)",
                    f"{self.metric_before:.2f} -> {self.metric_after:.2f}",
                )
            )
        rows += [(name, f"{before:.2f} -> {after:.2f}") for name, (before, after) in self.other_scores.items()]
        names = {
            "peak_allocated_bytes": "peak GPU memory, allocated",
            "peak_reserved_bytes": "peak GPU memory, reserved",
            "peak_resident_bytes": "peak resident memory",
        }
        rows += [(names[key], show_bytes(value)) for key, value in self.peak_bytes.items() if key in names]
        if self.memory.get("error_percent") is not None:
            predicted, measured = (show_bytes(self.memory[f"{key}_bytes"]) for key in ("predicted", "measured"))
            rows.append(
                (
                    "memory of training",
                    f"{predicted} predicted, {measured} measured ({self.memory['error_percent']:+.1f} %)",
                )
            )
        rows.append(("time", f"{show_seconds(self.total_seconds)} (training {show_seconds(self.train_seconds)})"))
        if self.tokens_per_second:
            rows.append(("tokens per second", f"{self.tokens_per_second:,.0f}"))
        rows += [("changed in the run", growth) for growth in self.growths]
        if self.verdict is not None:
            rows.append(("quality", self.verdict.line))
            action = self.verdict.action
            if action.said != "nothing":
                changes = f": {' '.join(action.overrides)}" if action.overrides else ""
                rows.append(("advice", f"{action.said}{changes}"))
        rows.append(("result", str(self.result) if self.result else "none yet"))
        return rows

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def read_summary(run: RunDir) -> Summary:
    """Read the summary of a run, finished or not."""
    plan = read_plan(run)
    events, device = run.events(), read_sealed(run.path / "environment.json")["device"]["name"]
    by_step = {event.step: event for event in of_type(events, StepEvent)}
    steps = [by_step[step] for step in sorted(by_step)]
    done = last_of(events, DoneEvent)
    if plan.growths and not plan.growths[-1].kept and done:
        steps = [event for event in steps if event.step <= done.step]  # the rest was taken back
    evals = {event.step: event.loss for event in of_type(events, EvalEvent)}
    parameters, memory = last_of(events, ParametersEvent), last_of(events, MemoryEvent)
    before, after = last_of(events, MetricEvent, when="before"), last_of(events, MetricEvent, when="after")
    other_scores = {}
    if before is not None and after is not None:
        names = [name for name in after.scores if name != after.name and name in before.scores]
        other_scores = {name: (before.scores[name], after.scores[name]) for name in names}
    rates = sorted(event.tokens_per_second for event in steps if event.tokens_per_second)
    verdict = last_of(events, VerdictEvent)
    peak_bytes: dict[str, int] = {}  # the highest of the run: the measurement starts anew between its phases
    for use in (event["memory"] for event in events if isinstance(event.get("memory"), Mapping)):
        for key in [key for key in use if key.startswith("peak_")]:
            peak_bytes[key] = max(use[key], peak_bytes.get(key, 0))
    return Summary(
        path=run.path,
        base=plan.base.id,
        method=plan.method.name,
        device=device,
        num_steps=steps[-1].step if steps else 0,
        num_trainable=parameters.num_trainable if parameters else 0,
        num_total=parameters.num_total if parameters else 0,
        trainable_by_role=parameters.by_role if parameters else {},
        loss_first=steps[0].loss if steps else None,
        loss_last=steps[-1].loss if steps else None,
        eval_loss_before=evals.get(0),
        eval_loss_after=evals.get(done.published_step) if done else None,
        metric=after.name if after else None,
        metric_before=before.value if before else None,
        metric_after=after.value if after else None,
        num_metric_examples=after.num_examples if after else 0,
        other_scores=other_scores,
        peak_bytes=peak_bytes,
        train_seconds=sum(event.step_seconds for event in steps),
        total_seconds=(events[-1].at_seconds or 0.0) if events else 0.0,
        tokens_per_second=rates[len(rates) // 2] if rates else None,
        result=run.path / done.result if done else None,
        memory=memory or {},
        verdict=Verdict.from_json(verdict) if verdict else None,
        growths=tuple(
            f"step {growth.step}, {growth.cause}: {' '.join(growth.overrides)}"
            + ("" if growth.kept else "; it did not pay off and was rolled back")
            for growth in plan.growths
        ),
    )
