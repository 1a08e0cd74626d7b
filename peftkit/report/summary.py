"""The outcome of a run in numbers, read from its events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.diagnose.verdict import Verdict
from peftkit.plan.plan import Growth, read_plan
from peftkit.rundir import RunDir, read_sealed
from peftkit.units import html_table, show_bytes, show_count, show_percent, show_seconds


@dataclass(frozen=True)
class Summary:
    """What was trained, what it took, what it brought. Losses are nats per learnt token."""

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
        """What a person can do with the result now."""
        if self.result is None:
            return (f"peftkit resume {self.path}",)
        asked = (f"peftkit generate {self.path} 'your prompt'",)
        following = self.path / "next-recipe.yaml"
        return (*asked, f"peftkit finetune {following}") if following.is_file() else asked

    def rows(self) -> list[tuple[str, str]]:
        """The summary as (what, value), for a table."""
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
        rows += [
            (name, f"{before:.2f} -> {after:.2f}") for name, (before, after) in self.other_scores.items()
        ]
        names = {
            "peak_allocated_bytes": "peak GPU memory, allocated",
            "peak_reserved_bytes": "peak GPU memory, reserved",
            "peak_resident_bytes": "peak resident memory",
        }
        rows += [(names[key], show_bytes(value)) for key, value in self.peak_bytes.items() if key in names]
        if self.memory.get("error_percent") is not None:
            said, was = (show_bytes(self.memory[f"{key}_bytes"]) for key in ("predicted", "measured"))
            rows.append(
                (
                    "memory of training",
                    f"{said} predicted, {was} measured ({self.memory['error_percent']:+.1f} %)",
                )
            )
        rows.append(
            ("time", f"{show_seconds(self.total_seconds)} (training {show_seconds(self.train_seconds)})")
        )
        if self.tokens_per_second:
            rows.append(("tokens per second", f"{self.tokens_per_second:,.0f}"))
        rows += [("grown", growth) for growth in self.growths]
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


def _last(events: list[dict[str, Any]], name: str, **match: Any) -> dict[str, Any] | None:
    found = [e for e in events if e["event"] == name and all(e.get(k) == v for k, v in match.items())]
    return found[-1] if found else None


def _peaks(events: list[dict[str, Any]]) -> dict[str, int]:
    """The highest of each kind over the run: the measurement starts anew between its phases."""
    found: dict[str, int] = {}
    for event in events:
        for key, value in event["memory"].items() if isinstance(event.get("memory"), dict) else ():
            if key.startswith("peak_"):
                found[key] = max(value, found.get(key, 0))
    return found


def _final_steps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Step events, the last record of each step: a resumed run may have trained some twice."""
    by_step = {event["step"]: event for event in events if event["event"] == "step"}
    return [by_step[step] for step in sorted(by_step)]


def _others(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> dict[str, tuple[float, float]]:
    """Scores beside the chosen metric, before and after."""
    if before is None or after is None:
        return {}
    first, last = before.get("scores", {}), after.get("scores", {})
    return {name: (first[name], last[name]) for name in last if name != after["name"] and name in first}


def _verdict(events: list[dict[str, Any]]) -> Verdict | None:
    """Of the last look at the run."""
    found = _last(events, "verdict")
    return Verdict.from_json(found) if found else None


def _growth(growth: Growth) -> str:
    taken_back = "" if growth.kept else "; it did not pay, and was taken back"
    return f"step {growth.step}, {growth.cause}: {' '.join(growth.overrides)}{taken_back}"


def read_summary(run: RunDir) -> Summary:
    """The summary of a run, finished or not."""
    plan = read_plan(run)
    events, device = run.events(), read_sealed(run.path / "environment.json")["device"]["name"]
    steps = _final_steps(events)
    if plan.growths and not plan.growths[-1].kept and (ended := _last(events, "done")):
        steps = [event for event in steps if event["step"] <= ended["step"]]  # the rest was taken back
    evals = {event["step"]: event["loss"] for event in events if event["event"] == "eval"}
    done, counted = _last(events, "done"), _last(events, "parameters") or {}
    before, after = _last(events, "metric", when="before"), _last(events, "metric", when="after")
    rates = sorted(e["tokens_per_second"] for e in steps if e.get("tokens_per_second"))
    return Summary(
        path=run.path,
        base=plan.base.id,
        method=plan.method.name,
        device=device,
        num_steps=steps[-1]["step"] if steps else 0,
        num_trainable=counted.get("num_trainable", 0),
        num_total=counted.get("num_total", 0),
        trainable_by_role=counted.get("by_role", {}),
        loss_first=steps[0]["loss"] if steps else None,
        loss_last=steps[-1]["loss"] if steps else None,
        eval_loss_before=evals.get(0),
        eval_loss_after=evals.get(done["published_step"]) if done else None,
        metric=after["name"] if after else None,
        metric_before=before["value"] if before else None,
        metric_after=after["value"] if after else None,
        num_metric_examples=after["num_examples"] if after else 0,
        other_scores=_others(before, after),
        peak_bytes=_peaks(events),
        train_seconds=sum(e["step_seconds"] for e in steps),
        total_seconds=events[-1]["at_seconds"] if events else 0.0,
        tokens_per_second=rates[len(rates) // 2] if rates else None,
        result=run.path / done["result"] if done else None,
        memory=_last(events, "memory") or {},
        verdict=_verdict(events),
        growths=tuple(map(_growth, plan.growths)),
    )
