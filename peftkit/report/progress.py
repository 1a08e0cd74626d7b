"""Progress on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatch
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from peftkit.rundir.events import (
    ChangedEvent,
    ChecksEvent,
    DataEvent,
    EarlyStopEvent,
    EvalEvent,
    Event,
    ForkEvent,
    GrowthEvent,
    GrowthKeptEvent,
    GrowthTakenBackEvent,
    InterruptedEvent,
    MemoryEvent,
    MetricEvent,
    NoticeEvent,
    Observer,
    OutOfMemoryEvent,
    ParametersEvent,
    PhaseEvent,
    PreflightEvent,
    ProgressEvent,
    RateForkEvent,
    RateFoundEvent,
    ResumeEvent,
    RollbackEvent,
    SpikeEvent,
    StepEvent,
    TrainBeginEvent,
    VerdictEvent,
    WarningEvent,
)
from peftkit.secrets import redact
from peftkit.units import printable, show_bytes, show_count, show_percent, show_seconds

_PHASE_LABELS = {
    "base": "base",
    "data": "reading",
    "diagnosis": "diagnosing",
    "model": "loading",
    "metric": "evaluating",
    "publish": "writing",
}
_LINE_SECONDS = 5.0
_LIBRARIES = ("bitsandbytes", "peft", "transformers", "trl", "torch", "accelerate", "kernels", "datasets")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the warnings of libraries while the block runs: what matters to a user is an event."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(?!peftkit)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@singledispatch
def format_event(event: Event) -> str | None:
    """Return an event as a line of text, or None where it has none. One function per event type follows."""
    return None


@format_event.register
def _(event: PhaseEvent) -> str:
    return f"{_PHASE_LABELS.get(event.name, event.name)}: {event.detail}"


@format_event.register
def _(event: ChecksEvent) -> str:
    return f"data gate: {event.verdict}; {event.batching}"


@format_event.register
def _(event: DataEvent) -> str:
    dropped_text = f", {event.num_dropped} rows too long were dropped" if event.num_dropped else ""
    cut_text = f", {event.num_cut} rows were cut" if event.num_cut else ""
    template_text = "; the base has no chat template, the default one is used" if event.default_template else ""
    rows = f"{show_count(event.num_train)} rows to train on, {show_count(event.num_eval)} held out"
    trained_share = show_percent(event.num_learnt / max(1, event.num_tokens))
    tokens = f"{show_count(event.num_tokens)} tokens, {show_count(event.num_learnt)} trained ({trained_share})"
    return f"data: {rows}, {tokens}{dropped_text}{cut_text}{template_text}"


@format_event.register
def _(event: ParametersEvent) -> str:
    roles = ", ".join(f"{role} {show_count(n)}" for role, n in event.by_role.items())
    line = (
        f"trainable: {show_count(event.num_trainable)} of {show_count(event.num_total)} "
        f"({show_percent(event.num_trainable / event.num_total)}): {roles}"
    )
    if event.num_planned is None or event.num_planned == event.num_trainable:
        return line
    return f"{line}; the plan predicted {show_count(event.num_planned)}"


@format_event.register
def _(event: PreflightEvent) -> str:
    tensors_text = f"all {show_count(event.num_tensors)} trained tensors get a gradient"
    return f"preflight: {tensors_text}, {show_count(event.num_frozen)} frozen ones unchanged"


@format_event.register
def _(event: MetricEvent) -> str:
    return f"{event.name} {event.when}: {event.value:.2f} on {event.num_examples} held out"


@format_event.register
def _(event: EvalEvent) -> str:
    return f"step {event.step}: evaluation loss {event.loss:.4f}" + (", the best so far" if event.best else "")


@format_event.register
def _(event: OutOfMemoryEvent) -> str:
    size = event.next_micro_batch
    retry_text = f"; continuing from step {event.step} with micro-batches of {size}" if size else ""
    return f"out of memory {event.text}{retry_text}"


@format_event.register
def _(event: MemoryEvent) -> str:
    predicted_text = f"memory of training: {show_bytes(event.predicted_bytes)} predicted"
    if event.error_percent is None:
        return f"{predicted_text}, too little to measure beside the process's own"
    text = f"{predicted_text}, {show_bytes(event.measured_bytes)} measured ({event.error_percent:+.1f} %)"
    if event.process_bytes is None or event.process_bytes <= event.measured_bytes:
        return text
    return f"{text}; the process, with what it keeps of freed memory: {show_bytes(event.process_bytes)}"


@format_event.register
def _(event: SpikeEvent) -> str:
    rows_text = f"; rows {', '.join(event.rows)}" if event.rows else ""
    return f"step {event.step}: {event.text}{rows_text}; advice: {event.advice}"


@format_event.register
def _(event: RollbackEvent) -> str:
    return f"{event.text}: back to step {event.step}, with half the learning rate, {event.learning_rate:.2e}"


@format_event.register
def _(event: VerdictEvent) -> str:
    action_text, overrides = event.action["said"], event.action["overrides"]
    changes = f": {' '.join(overrides)}" if overrides else ""
    advice = f"; {action_text}{changes}" if action_text != "nothing" else ""
    return f"step {event.step}: {event.text}{advice}"


@format_event.register
def _(event: ForkEvent) -> str:
    if event.loss is None or event.gain is None:
        return f"fork {event.name}: its loss was not finite"
    return f"fork {event.name}: {event.num_steps} steps gained {event.gain[0]:+.4f} nats"


@format_event.register
def _(event: RateForkEvent) -> str:
    loss = "not finite" if event.loss is None else f"{event.loss:.4f}"
    return f"learning rate {event.learning_rate:.3g}: held-out loss {loss} after {event.num_steps} steps"


@format_event.register
def _(event: RateFoundEvent) -> str:
    return f"learning rate {event.learning_rate:.3g}, by {event.overhead:.1%} of the run: {event.text}"


@format_event.register
def _(event: GrowthEvent) -> str:
    what = f"the adapter grows to {event.num_trainable:,} trainable parameters"
    what = {"learning rate too high": "a new adapter starts", "learning rate too low": "the run goes on"}.get(
        event.cause, what
    )
    rate, total = f"at a learning rate of {event.learning_rate:.2e}", f"{event.num_steps} steps in total"
    return f"step {event.step}: {event.cause}: {what}, {rate}; {total}"


@format_event.register
def _(event: GrowthKeptEvent) -> str:
    return f"step {event.step}: the change reduced the loss: {event.gain[0]:+.4f} nats"


@format_event.register
def _(event: GrowthTakenBackEvent) -> str:
    return f"step {event.step}: the change did not reduce the loss: undone ({event.text})"


@format_event.register
def _(event: ChangedEvent) -> str:
    return f"resuming although {event.text}"


@format_event.register
def _(event: ResumeEvent) -> str:
    return f"resuming from step {event.step}"


@format_event.register
def _(event: EarlyStopEvent) -> str:
    return f"step {event.step}: stopped early, no improvement in {event.patience} evaluations"


@format_event.register
def _(event: InterruptedEvent) -> str:
    return f"step {event.step}: stopped by a signal"


@format_event.register
def _(event: WarningEvent) -> str:
    return f"warning: {event.text}"


@format_event.register
def _(event: NoticeEvent) -> str:
    return event.text


def printable_line(event: Event) -> str | None:
    """Return an event as a line that is safe to print: without secrets and control characters."""
    line = format_event(event)
    return None if line is None else printable(redact(line))


def _format_memory(event: StepEvent) -> str:
    memory = event.memory or {}
    return show_bytes(memory.get("allocated_bytes", memory.get("resident_bytes", 0)))


class PlainDisplay:
    """A display in lines, for logs and pipes: every message, and a step line every few seconds."""

    def __init__(self) -> None:
        self.last_line = 0.0
        self.num_steps = 0
        self.step_seconds: deque[float] = deque(maxlen=20)

    def show(self, event: Event) -> None:
        """Print the event's line; a step's only every few seconds."""
        if isinstance(event, TrainBeginEvent):
            self.num_steps = event.num_steps
        if not isinstance(event, StepEvent):
            if line := printable_line(event):
                print(line, file=sys.stderr, flush=True)
            return
        self.step_seconds.append(event.step_seconds)
        if time.monotonic() - self.last_line < _LINE_SECONDS and event.step not in {1, self.num_steps}:
            return
        self.last_line = time.monotonic()
        seconds_left = (self.num_steps - event.step) * statistics.fmean(self.step_seconds)
        print(
            f"step {event.step}/{self.num_steps}: loss {event.loss:.4f}, "
            f"{event.tokens_per_second or 0:,.0f} tokens/s, learning rate {event.learning_rate:.2e}, "
            f"memory {_format_memory(event)}, {show_seconds(seconds_left)} left",
            file=sys.stderr,
            flush=True,
        )


class LiveDisplay:
    """A display of live lines, the phase and its time, and a bar of the steps; messages scroll above them."""

    def __init__(self, console: Console) -> None:
        self.phases = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.live = Live(Group(self.phases, self.progress), console=console, transient=True, refresh_per_second=8)
        self.task: Any = None

    def show(self, event: Event) -> None:
        """Update the live line, or print a message above it."""
        if isinstance(event, PhaseEvent | TrainBeginEvent):
            for phase in self.phases.task_ids:
                self.phases.remove_task(phase)
        if isinstance(event, PhaseEvent):
            self.phases.add_task(_PHASE_LABELS.get(event.name, event.name), total=None)
        elif isinstance(event, TrainBeginEvent):
            if self.task is not None:  # begun anew, with half the micro-batch or more directions
                self.progress.remove_task(self.task)
            self.task = self.progress.add_task("training", total=event.num_steps, completed=event.step, numbers="")
        elif isinstance(event, StepEvent) and self.task is not None:
            numbers = (
                f"loss {event.loss:.3f}  {event.tokens_per_second or 0:,.0f} tok/s  "
                f"lr {event.learning_rate:.1e}  {_format_memory(event)}"
            )
            self.progress.update(self.task, completed=event.step, numbers=numbers)
        if line := printable_line(event):
            self.live.console.print(line, highlight=False, markup=False)
        if isinstance(event, PhaseEvent) and event.name == "publish" and self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None


@contextmanager
def open_display() -> Iterator[Observer]:
    """Yield an observer that shows events: live on a terminal and in a notebook, else in lines."""
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield PlainDisplay().show
        return
    display = LiveDisplay(console)
    with display.live:
        yield display.show


@contextmanager
def open_bytes_display() -> Iterator[Observer]:
    """Yield an observer: on a terminal or in a notebook a bar of bytes, elsewhere a line every few seconds."""
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        last_line_time = time.monotonic()

        def show_lines(event: Event) -> None:
            nonlocal last_line_time
            if not isinstance(event, ProgressEvent):
                if line := printable_line(event):
                    print(line, file=sys.stderr, flush=True)
            elif time.monotonic() - last_line_time >= _LINE_SECONDS:
                last_line_time = time.monotonic()
                text = f"written {show_bytes(event.done_bytes)} of {show_bytes(event.total_bytes)}"
                print(text, file=sys.stderr, flush=True)

        yield show_lines
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("writing", total=None, visible=False)

        def show(event: Event) -> None:
            if isinstance(event, ProgressEvent):
                is_done = event.done_bytes >= event.total_bytes
                progress.update(task, completed=event.done_bytes, total=event.total_bytes, visible=not is_done)
            elif line := printable_line(event):
                progress.console.print(line, highlight=False, markup=False)

        yield show
