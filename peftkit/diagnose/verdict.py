"""The verdict: state of the quality, cause, action, its gain and cost, and every number behind it."""

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
    """Cost of an action by the plan: parameters, bytes at the peak, and compute of a step as a factor."""

    num_trainable: int
    peak_bytes: int
    times: float


@dataclass(frozen=True)
class Action:
    """An action as changes of the recipe. `gain` is measured on rows not used for the decision, in nats."""

    said: str
    overrides: tuple[str, ...] = ()
    gain: Interval | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of a diagnosis at a step. `overhead` is its share of the run's tokens."""

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
        """The verdict in one sentence."""
        finding = self.state if self.cause == "none" else f"{self.state}; cause: {self.cause}"
        return f"{finding} ({self.said})"

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) rows for a table."""
        num = self.loss.num_documents
        caveat = "" if num >= FEW_ROWS else f"; of only {num} held-out document{'' if num == 1 else 's'}"
        found = [
            ("quality", self.state),
            ("loss", f"{self.loss.mean:.4f} [{self.loss.low:.4f}, {self.loss.high:.4f}]{caveat}"),
            ("cause", self.cause),
            ("why", self.said),
            ("action", self.action.said),
        ]
        if self.action.overrides:
            found.append(("changes", " ".join(self.action.overrides)))
        if self.action.gain is not None:
            found.append(
                ("expected gain", f"{self.action.gain} nats per token, on held-out rows not used for the decision")
            )
        if self.action.cost is not None:
            cost = self.action.cost
            parameters = f"{show_count(cost.num_trainable)} trainable parameters"
            work = f"{cost.times:.2f} x the compute of a step"
            found.append(("cost", f"{parameters}, {show_bytes(cost.peak_bytes)} at the peak, {work}"))
        overhead = show_percent(self.overhead)
        reference_note = (
            f", and {show_percent(self.reference_overhead)} for the reference" if self.reference_overhead else ""
        )
        found.append(("diagnosis cost", f"{overhead} of the run's tokens{reference_note}"))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain values for an event or file; infinite bounds become None, which JSON can hold."""
        return dict(_without_infinity(asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """Restore the verdict that `to_json` wrote."""
        action = dict(value["action"])
        gain, cost = action.get("gain"), action.get("cost")
        parsed_action = Action(
            action["said"],
            tuple(action["overrides"]),
            _interval_from_json(gain) if gain else None,
            Cost(**cost) if cost else None,
        )
        field_values = {
            field_info.name: value[field_info.name] for field_info in fields(cls) if field_info.name in value
        }
        return cls(**{**field_values, "action": parsed_action, "loss": _interval_from_json(value["loss"])})

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def _without_infinity(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval_from_json(value: Mapping[str, Any]) -> Interval:
    low, high = value["low"], value["high"]
    return Interval(
        value["mean"], -math.inf if low is None else low, math.inf if high is None else high, value["num_documents"]
    )
