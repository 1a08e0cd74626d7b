"""Events of a run: one frozen type per kind, written as one JSON line each, read back typed.

A reader asks for a type (`of_type(events, StepEvent)`). An event is also a mapping of its fields, "event"
included, for observers that read `event["step"]`; `to_json()` gives the dict. Lines of an unknown kind, or without a
field that their type needs, are read as `UnknownEvent` and lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, TypeVar

MemoryUse = Mapping[str, int]  # "resident_bytes", "allocated_bytes", "peak_..._bytes": what the device tells
Gain = Sequence[float | None]  # mean, low and high of an interval, in nats per token
EVENT_TYPES: dict[str, type[Event]] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Event(Mapping[str, Any]):
    """Something that happened. `at_seconds` counts from the run's start; None for what is only shown."""

    kind: ClassVar[str] = ""
    at_seconds: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields of another version

    def __init_subclass__(cls, *, kind: str = "") -> None:
        cls.kind = kind
        EVENT_TYPES[kind] = cls

    def to_json(self) -> dict[str, Any]:
        """Return the event as the JSON object of its line; optional fields that are not set are left out."""
        record: dict[str, Any] = {"event": self.kind}
        if self.at_seconds is not None:
            record["at_seconds"] = self.at_seconds
        for f in fields(self)[2:]:
            value = getattr(self, f.name)
            if value is not f.default or f.default is MISSING:
                record[f.name] = value
        return {**record, **self.extra}

    def __getitem__(self, key: str) -> Any:
        return self.to_json()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_json())

    def __len__(self) -> int:
        return len(self.to_json())


Observer = Callable[[Event], None]  # gets each event as it happens
AnyEvent = TypeVar("AnyEvent", bound=Event)


def ignore_event(event: Event) -> None:
    """Observe nothing: the default observer."""


def of_type(events: Sequence[Event], event_type: type[AnyEvent]) -> list[AnyEvent]:
    """Return the events of one type, in order."""
    return [event for event in events if isinstance(event, event_type)]


def last_of(events: Sequence[Event], event_type: type[AnyEvent], **fields: object) -> AnyEvent | None:
    """Return the last event of a type with these fields; None where there is none."""
    matches = [
        event
        for event in of_type(events, event_type)
        if all(getattr(event, key) == value for key, value in fields.items())
    ]
    return matches[-1] if matches else None


def last_second(events: Sequence[Event]) -> float:
    """Return the time of the last event, in seconds since the run's start."""
    return max((event.at_seconds or 0.0 for event in events), default=0.0)


def read_event(record: Mapping[str, Any]) -> Event:
    """Return the typed event of a JSON object; fields that its type does not know are kept in `extra`."""
    event_type = EVENT_TYPES.get(str(record["event"]), UnknownEvent)
    known = {f.name: f.default is MISSING for f in fields(event_type) if f.name != "extra"}
    values = {key: value for key, value in record.items() if key in known}
    others = {key: value for key, value in record.items() if key not in known and key != "event"}
    if event_type is UnknownEvent or any(needed and name not in values for name, needed in known.items()):
        others = {key: value for key, value in record.items() if key not in {"event", "at_seconds"}}
        return UnknownEvent(name=str(record["event"]), at_seconds=record.get("at_seconds"), extra=others)
    return event_type(**values, extra=others)


class _Unset(Enum):
    """The default of fields that are left out of a line unless they are set, to None included; false."""

    UNSET = "unset"

    def __bool__(self) -> bool:
        return False


UNSET: Any = _Unset.UNSET


@dataclass(frozen=True, kw_only=True, eq=False)
class UnknownEvent(Event, kind="?"):
    """An event of another version of peftkit, with all its fields in `extra`."""

    name: str

    def to_json(self) -> dict[str, Any]:
        """Return the line as it was."""
        time = {} if self.at_seconds is None else {"at_seconds": self.at_seconds}
        return {"event": self.name, **time, **self.extra}


@dataclass(frozen=True, kw_only=True, eq=False)
class PhaseEvent(Event, kind="phase"):
    """The beginning of a phase: base, data, model, metric, diagnosis, publish, merge, verify, gguf."""

    name: str
    detail: str


@dataclass(frozen=True, kw_only=True, eq=False)
class WarningEvent(Event, kind="warning"):
    """Something the user should know."""

    text: str


@dataclass(frozen=True, kw_only=True, eq=False)
class NoticeEvent(Event, kind="notice"):
    """A message of a merge or an export."""

    text: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ProgressEvent(Event, kind="progress"):
    """How much of a merge or an export is written."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ChecksEvent(Event, kind="checks"):
    """The verdict of the data gate, and how rows are batched."""

    verdict: str
    batching: str


@dataclass(frozen=True, kw_only=True, eq=False)
class DataEvent(Event, kind="data"):
    """The prepared data: rows and tokens. `num_learnt` are the tokens in the loss."""

    num_train: int
    num_eval: int
    num_tokens: int
    num_learnt: int
    num_dropped: int
    num_cut: int
    default_template: bool
    chats: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class ParametersEvent(Event, kind="parameters"):
    """Counted parameters of the wrapped model, beside the planned number."""

    num_trainable: int
    num_total: int
    by_role: Mapping[str, int]
    num_planned: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class PreflightEvent(Event, kind="preflight"):
    """The result of the preflight."""

    loss: float
    num_tensors: int
    num_waiting: int
    num_frozen: int
    peak_bytes: int | None = None  # of torch's CPU allocator
    memory: MemoryUse


@dataclass(frozen=True, kw_only=True, eq=False)
class ResumeEvent(Event, kind="resume"):
    """The step from which training continues."""

    step: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ChangedEvent(Event, kind="changed"):
    """What changed since the run began, and was allowed to."""

    text: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBeginEvent(Event, kind="train_begin"):
    """The beginning of the training loop."""

    step: int
    num_steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class StepEvent(Event, kind="step"):
    """An optimizer step. The loss is the mean over its trained tokens, in nats."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    step_seconds: float
    tokens_per_second: float | None
    memory: MemoryUse = UNSET


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalEvent(Event, kind="eval"):
    """An evaluation on the held-out rows; `rows` are the summed losses of a fixed sample of them."""

    step: int
    loss: float
    best: bool
    rows: Sequence[float] = UNSET
    memory: MemoryUse = UNSET


@dataclass(frozen=True, kw_only=True, eq=False)
class EarlyStopEvent(Event, kind="early_stop"):
    """The end of a training that no longer improves."""

    step: int
    patience: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SpikeEvent(Event, kind="spike"):
    """A step whose loss or gradients were not finite or far off, and its worst rows."""

    step: int
    text: str
    skipped: bool
    num_in_a_row: int
    num_skipped: int
    rows: Sequence[str]
    advice: str


@dataclass(frozen=True, kw_only=True, eq=False)
class RollbackEvent(Event, kind="rollback"):
    """A return to an earlier checkpoint at half the learning rate."""

    text: str
    step: int
    learning_rate: float
    first_bad_step: int


@dataclass(frozen=True, kw_only=True, eq=False)
class OutOfMemoryEvent(Event, kind="oom"):
    """Memory ran out; `next_micro_batch` is None where the run stops."""

    phase: str
    text: str
    micro_batch: int
    next_micro_batch: int | None
    next_accumulation: int | None
    step: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointEvent(Event, kind="checkpoint"):
    """A checkpoint that is on the disk and verified."""

    step: int
    path: str
    seconds: float
    size_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryEvent(Event, kind="memory"):
    """Predicted and measured memory of training; no error where the measurement is too coarse.

    `process_bytes` is what a CPU's process grew by: more than its tensors, for glibc keeps freed memory.
    """

    depth: str
    predicted_bytes: int
    measured_bytes: int
    error_percent: float | None
    process_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class MetricEvent(Event, kind="metric"):
    """The recipe's metric on held-out examples, before or after training."""

    when: str
    name: str
    value: float
    scores: Mapping[str, float]
    num_examples: int
    samples: Sequence[Any]
    memory: MemoryUse = UNSET


@dataclass(frozen=True, kw_only=True, eq=False)
class ForkEvent(Event, kind="fork"):
    """A short training from the current state, made to find a cause."""

    step: int
    name: str
    learning_rate: float
    num_steps: int
    train_loss: float
    loss: float | None
    gain: Gain | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RateForkEvent(Event, kind="rate_fork"):
    """A fork of the start at one learning rate; `row_losses` are None where they were not finite."""

    learning_rate: float
    num_steps: int
    loss: float | None
    row_losses: Sequence[float] | None
    num_tokens: float


@dataclass(frozen=True, kw_only=True, eq=False)
class RateFoundEvent(Event, kind="rate_found"):
    """The end of the search for the learning rate, and what it took of the run's tokens."""

    learning_rate: float
    usual: float
    interval: Sequence[float] | None
    text: str
    overhead: float


@dataclass(frozen=True, kw_only=True, eq=False)
class VerdictEvent(Event, kind="verdict"):
    """The verdict of a diagnosis: the fields of `diagnose.Verdict`, with its line as `text`."""

    step: int
    text: str
    state: str
    cause: str
    said: str
    action: Mapping[str, Any]
    loss: Any
    num_rows: int
    overhead: float
    reference_overhead: float
    kept: bool | None
    numbers: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class GrowthEvent(Event, kind="growth"):
    """An escalation: the adapter grows, or the learning rate changes, and training continues."""

    step: int
    cause: str
    overrides: Sequence[str]
    num_trainable: int | None
    learning_rate: float
    num_steps: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class GrowthKeptEvent(Event, kind="growth_kept"):
    """A growth that lowered the loss."""

    step: int
    gain: Gain


@dataclass(frozen=True, kw_only=True, eq=False)
class GrowthTakenBackEvent(Event, kind="growth_taken_back"):
    """A growth that did not lower the loss, or led to a divergence, and was undone."""

    step: int
    text: str
    gain: Gain | None


@dataclass(frozen=True, kw_only=True, eq=False)
class InterruptedEvent(Event, kind="interrupted"):
    """A stop by a signal, after a checkpoint."""

    step: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DoneEvent(Event, kind="done"):
    """The end of a run: its result is published."""

    step: int
    published_step: int
    result: str
    memory: MemoryUse = UNSET
