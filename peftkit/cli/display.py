"""Progress on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from peftkit.secrets import redact
from peftkit.units import printable, show_bytes, show_count, show_percent, show_seconds

_PHASES = {
    "base": "base",
    "data": "reading",
    "diagnosis": "looking",
    "model": "loading",
    "metric": "measuring",
    "publish": "writing",
}
_PLAIN_SECONDS = 5.0


class Display(Protocol):
    """Shows events as they come."""

    def show(self, event: dict[str, Any]) -> None: ...


def quiet_loggers() -> None:
    """Silence library chatter that would tear the display."""
    for name in ("bitsandbytes", "peft", "transformers", "trl", "torch", "accelerate", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _data(event: dict[str, Any]) -> str:
    dropped = f", {event['num_dropped']} rows too long were dropped" if event["num_dropped"] else ""
    cut = f", {event['num_cut']} rows were cut" if event["num_cut"] else ""
    default = "; the base has no chat template, the default one is used" if event["default_template"] else ""
    rows = f"{show_count(event['num_train'])} rows to train on, {show_count(event['num_eval'])} held out"
    learnt = show_percent(event["num_learnt"] / max(1, event["num_tokens"]))
    tokens = f"{show_count(event['num_tokens'])} tokens, {show_count(event['num_learnt'])} learnt ({learnt})"
    return f"data: {rows}, {tokens}{dropped}{cut}{default}"


def _parameters(event: dict[str, Any]) -> str:
    roles = ", ".join(f"{role} {show_count(n)}" for role, n in event["by_role"].items())
    line = (
        f"trainable: {show_count(event['num_trainable'])} of {show_count(event['num_total'])} "
        f"({show_percent(event['num_trainable'] / event['num_total'])}): {roles}"
    )
    planned = event["num_planned"]
    odd = planned is not None and planned != event["num_trainable"]
    return f"{line}; the plan said {show_count(planned)}" if odd else line


def _preflight(event: dict[str, Any]) -> str:
    reached = f"all {show_count(event['num_tensors'])} trained tensors are reached"
    return f"preflight: {reached}, {show_count(event['num_frozen'])} frozen ones unchanged"


def _out_of_memory(event: dict[str, Any]) -> str:
    size = event["next_micro_batch"]
    smaller = f"; going on from step {event['step']} in pieces of {size}" if size else ""
    return f"out of memory {event['text']}{smaller}"


def _compared(event: dict[str, Any]) -> str:
    said, was = show_bytes(event["predicted_bytes"]), show_bytes(event["measured_bytes"])
    error = event["error_percent"]
    if error is None:
        return f"memory of training: {said} predicted, too little to be told from the process's own"
    return f"memory of training: {said} predicted, {was} measured ({error:+.1f} %)"


def _spike(event: dict[str, Any]) -> str:
    shown = f"; rows {', '.join(event['rows'])}" if event["rows"] else ""
    return f"step {event['step']}: {event['text']}{shown}; usual advice: {event['advice']}"


def _verdict(event: dict[str, Any]) -> str:
    said, overrides = event["action"]["said"], event["action"]["overrides"]
    changes = f": {' '.join(overrides)}" if overrides else ""
    advice = f"; {said}{changes}" if said != "nothing" else ""
    return f"step {event['step']}: {event['text']}{advice}"


def _fork(event: dict[str, Any]) -> str:
    if event["loss"] is None:
        return f"fork {event['name']}: its loss was not finite"
    return f"fork {event['name']}: {event['num_steps']} steps gained {event['gain'][0]:+.4f} nats"


_SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "phase": lambda event: f"{_PHASES.get(event['name'], event['name'])}: {event['detail']}",
    "checks": "data gate: {verdict}; {batching}".format_map,
    "data": _data,
    "parameters": _parameters,
    "preflight": _preflight,
    "metric": lambda event: (
        f"{event['name']} {event['when']}: {event['value']:.2f} on {event['num_examples']} held out"
    ),
    "eval": lambda event: (
        f"step {event['step']}: evaluation loss {event['loss']:.4f}"
        + (", the best so far" if event["best"] else "")
    ),
    "oom": _out_of_memory,
    "memory": _compared,
    "spike": _spike,
    "rollback": ("{text}: back to step {step}, with half the learning rate, {learning_rate:.2e}".format_map),
    "verdict": _verdict,
    "fork": _fork,
    "growth": (
        "step {step}: the adapter grows to {num_trainable:,} trainable parameters, at a rate of "
        "{learning_rate:.2e}; {num_steps} steps in all".format_map
    ),
    "growth_kept": "step {step}: the growth paid: {gain[0]:+.4f} nats".format_map,
    "growth_taken_back": "step {step}: the growth did not pay: taken back ({text})".format_map,
    "changed": "going on though {text}".format_map,
    "resume": "going on from step {step}".format_map,
    "early_stop": "step {step}: stopped early, no gain in {patience} evaluations".format_map,
    "interrupted": "step {step}: stopped by a signal".format_map,
    "warning": "warning: {text}".format_map,
}


def _sentence(event: dict[str, Any]) -> str | None:
    """An event in words, or None where it has no line of its own."""
    says = _SENTENCES.get(event["event"])
    return printable(redact(says(event))) if says else None


def _memory(event: dict[str, Any]) -> str:
    memory = event.get("memory", {})
    return show_bytes(memory.get("allocated_bytes", memory.get("resident_bytes", 0)))


class PlainDisplay:
    """Lines for logs and pipes: every sentence, and a step line every few seconds."""

    def __init__(self) -> None:
        self.last_line = 0.0
        self.num_steps = 0
        self.step_seconds: list[float] = []

    def show(self, event: dict[str, Any]) -> None:
        if event["event"] == "train_begin":
            self.num_steps = event["num_steps"]
        if event["event"] == "step":
            self.step_seconds.append(event["step_seconds"])
            due = time.monotonic() - self.last_line >= _PLAIN_SECONDS
            if due or event["step"] in {1, self.num_steps}:
                self.last_line = time.monotonic()
                rate = event["tokens_per_second"]
                left = (self.num_steps - event["step"]) * statistics.fmean(self.step_seconds[-20:])
                print(
                    f"step {event['step']}/{self.num_steps}: loss {event['loss']:.4f}, "
                    f"{rate or 0:,.0f} tokens/s, learning rate {event['learning_rate']:.2e}, "
                    f"memory {_memory(event)}, {show_seconds(left)} left",
                    file=sys.stderr,
                    flush=True,
                )
            return
        line = _sentence(event)
        if line:
            print(line, file=sys.stderr, flush=True)


class LiveDisplay:
    """One live line with a bar; sentences scroll above it."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task: Any = None

    def show(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "train_begin":
            self.task = self.progress.add_task(
                "training", total=event["num_steps"], completed=event["step"], numbers=""
            )
        elif kind == "step" and self.task is not None:
            rate = event["tokens_per_second"]
            numbers = (
                f"loss {event['loss']:.3f}  {rate or 0:,.0f} tok/s  lr {event['learning_rate']:.1e}  "
                f"{_memory(event)}"
            )
            self.progress.update(self.task, completed=event["step"], numbers=numbers)
        line = _sentence(event)
        if line:
            self.progress.console.print(line, highlight=False, markup=False)
        if kind == "phase" and event["name"] == "publish" and self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None


@contextmanager
def open_display() -> Iterator[Display]:
    """The display that suits stderr."""
    quiet_loggers()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainDisplay()
        return
    live = LiveDisplay(console)
    with live.progress:
        yield live
