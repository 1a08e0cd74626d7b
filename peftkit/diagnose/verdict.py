"""The verdict: does quality lag, why, what to do, what that brings and costs, and every number behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peftkit.diagnose.causes import Cause
from peftkit.diagnose.quality import State
from peftkit.diagnose.statistics import Interval
from peftkit.units import html_table, show_bytes, show_count, show_percent

FEW_ROWS = 50  # below, intervals are told to be wide


@dataclass(frozen=True)
class Cost:
    """What an action adds, by the plan: parameters, bytes at the peak, and times the work of a step."""

    num_trainable: int
    peak_bytes: int
    times: float


@dataclass(frozen=True)
class Action:
    """What to do, as changes of the recipe. `gain` is of rows that no decision was made by, in nats."""

    said: str
    overrides: tuple[str, ...] = ()
    gain: Interval | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Verdict:
    """What was found at a step. `overhead` is the share of the run's tokens that finding it took."""

    step: int
    state: State | str
    cause: Cause
    said: str
    action: Action
    loss: Interval
    num_rows: int
    overhead: float = 0.0
    reference_overhead: float = 0.0
    kept: bool | None = None  # of an escalation that was made in the run
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The verdict in a sentence."""
        what = self.state if self.cause == "none" else f"{self.state}; cause: {self.cause}"
        return f"{what} ({self.said})"

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        few = "" if self.num_rows >= FEW_ROWS else f"; only {self.num_rows} rows: intervals are wide"
        found = [
            ("quality", self.state),
            ("loss", f"{self.loss.mean:.4f} [{self.loss.low:.4f}, {self.loss.high:.4f}]{few}"),
            ("cause", self.cause),
            ("why", self.said),
            ("action", self.action.said),
        ]
        if self.action.overrides:
            found.append(("changes", " ".join(self.action.overrides)))
        if self.action.gain is not None:
            found.append(("expected gain", f"{self.action.gain} nats, on rows that decided nothing"))
        if self.action.cost is not None:
            cost = self.action.cost
            added = f"{show_count(cost.num_trainable)} trainable parameters"
            work = f"{cost.times:.2f} x the work of a step"
            found.append(
                (
                    "cost",
                    f"{added}, {show_bytes(cost.peak_bytes)} at the peak, {work}",
                )
            )
        spent = show_percent(self.overhead)
        billed = (
            f", and {show_percent(self.reference_overhead)} for the reference"
            if self.reference_overhead
            else ""
        )
        found.append(("looking took", f"{spent} of the run's tokens{billed}"))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values, for an event or a file; JSON has no infinity, which bounds of one document are."""
        return dict(_without_infinity(asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """What `to_json` made."""
        action = dict(value["action"])
        gain, cost = action.get("gain"), action.get("cost")
        made = Action(
            action["said"],
            tuple(action["overrides"]),
            _interval(gain) if gain else None,
            Cost(**cost) if cost else None,
        )
        known = {one.name: value[one.name] for one in fields(cls) if one.name in value}
        return cls(**{**known, "action": made, "loss": _interval(value["loss"])})

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(value: Mapping[str, Any]) -> Interval:
    low, high = value["low"], value["high"]
    return Interval(
        value["mean"],
        -math.inf if low is None else low,
        math.inf if high is None else high,
        value["num_documents"],
    )
