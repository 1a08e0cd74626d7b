"""What the plan makes of method and data: a few rules with their sources, told and never acted on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftkit.methods import METHODS
from peftkit.plan.facts import Facts
from peftkit.plan.fit import judge
from peftkit.plan.memory import closed_form
from peftkit.plan.method import refusal
from peftkit.plan.packing import num_rows
from peftkit.plan.plan import Decision, Plan
from peftkit.units import show_bytes, show_count

_FEW_ROWS = 10_000  # below: adapters lose little against full fine-tuning and forget less
_MANY_EPOCHS = 5
_SMALL_METHODS = {"prefix", "prompt", "ia3", "ln", "vera"}


def advice(plan: Plan, facts: Facts) -> Iterator[Decision]:
    """Advice for a plan that has its batch and memory."""
    yield from _on_method(plan, facts)
    yield from _on_data(plan, facts)


def _told(about: str, value: str, reason: str) -> Decision:
    return Decision(f"advice.{about}", value, "decided", reason)


def _on_method(plan: Plan, facts: Facts) -> Iterator[Decision]:
    assert plan.memory is not None
    name, fit = plan.method.name, judge(plan.memory, facts.device)
    can = facts.device.kind == "cuda" and not refusal(METHODS["qlora"], facts.model.shape)
    if fit.verdict == "does not fit" and name in {"full", "lora"} and can:
        reason = f"{name} needs {show_bytes(-fit.margin_bytes)} more than is free"
        yield _told("method", "qlora", f"{reason}; a 4-bit base takes a quarter (Dettmers et al. 2023)")
    elif name == "full" and facts.data is not None and facts.data.num_train < _FEW_ROWS:
        rows = f"{show_count(facts.data.num_train)} rows are few for {show_count(plan.method.num_parameters)}"
        reason = f"{rows} weights: an adapter learns as well from so few and forgets less"
        yield _told("method", "lora", f"{reason} (Biderman et al. 2024; Schulman et al. 2025)")
    elif name == "qlora" and facts.device.kind == "cuda":
        plain = replace(plan, base=replace(plan.base, quant_type=None, experts_4bit=()))
        assert plan.batch is not None
        needed = judge(closed_form(facts.model.shape, plain, plan.batch), facts.device)
        if needed.verdict == "fits":
            room = f"{show_bytes(needed.needed_bytes)} of {show_bytes(needed.free_bytes)}"
            yield _told("method", "lora", f"it fits too ({room}): faster, and without 4-bit error")
    elif name in _SMALL_METHODS:
        reason = "few numbers are trained: where quality lags, the next rung is lora on all linear layers"
        yield _told("method", "lora", reason)


def _on_data(plan: Plan, facts: Facts) -> Iterator[Decision]:
    data, steps = facts.data, plan.train.num_steps
    if data is None or not steps:
        return
    epochs = steps * plan.train.batch_size / max(1, num_rows(plan, facts) or 0)
    if epochs > _MANY_EPOCHS:
        reason = f"every row is seen {epochs:.0f} times: held-out rows show when it only memorises"
        yield _told("epochs", f"{epochs:.0f}", reason)
    trained = plan.method.num_trainable or 0
    learnt = data.lengths.num_learnt if data.lengths and data.lengths.source == "counted" else 0
    if plan.method.name in {"lora", "qlora"} and learnt > trained > 0:
        tokens = f"{show_count(learnt)} learnt tokens for {show_count(trained)} trained parameters"
        reason = (
            f"{tokens}: an adapter may run out of capacity (Schulman et al. 2025); a larger rank gives more"
        )
        yield _told("capacity", "a larger rank", reason)
