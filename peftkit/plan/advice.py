"""Advice on method and data: a few rules with their sources, shown and never applied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftkit.methods import METHODS
from peftkit.plan.activations import is_adapted
from peftkit.plan.facts import Facts
from peftkit.plan.fit import check_fit
from peftkit.plan.memory import closed_form_memory
from peftkit.plan.method import refusal_reason
from peftkit.plan.packing import num_epochs
from peftkit.plan.plan import Decision, Plan
from peftkit.units import show_bytes, show_count

_FEW_ROWS = 10_000  # below: adapters lose little against full fine-tuning and forget less
_MANY_EPOCHS = 5
WARNING = "warning."  # how the keys of such decisions begin
_SMALL_METHODS = {"prefix", "prompt", "ia3", "ln", "vera"}


def advice(plan: Plan, facts: Facts) -> Iterator[Decision]:
    """Yield advice for a plan that has its batch and memory."""
    assert plan.memory is not None
    name, fit = plan.method.name, check_fit(plan.memory, facts.device)
    can_quantize = facts.device.kind == "cuda" and not refusal_reason(METHODS["qlora"], facts.model.shape)
    if fit.verdict == "does not fit" and name in {"full", "lora"} and can_quantize:
        reason = f"{name} needs {show_bytes(-fit.margin_bytes)} more than is free"
        yield _advise("method", "qlora", f"{reason}; a 4-bit base takes a quarter (Dettmers et al. 2023)")
    elif name == "full" and facts.data is not None and facts.data.num_train < _FEW_ROWS:
        rows = f"{show_count(facts.data.num_train)} rows are few for {show_count(plan.method.num_parameters)}"
        reason = f"{rows} weights: an adapter learns as well from so few rows and forgets less"
        yield _advise("method", "lora", f"{reason} (Biderman et al. 2024; Schulman et al. 2025)")
    elif name == "qlora" and facts.device.kind == "cuda":
        unquantized = replace(plan, base=replace(plan.base, quant_type=None, experts_4bit=()))
        assert plan.batch is not None
        unquantized_fit = check_fit(closed_form_memory(facts.model.shape, unquantized, plan.batch), facts.device)
        if unquantized_fit.verdict == "fits":
            room = f"{show_bytes(unquantized_fit.needed_bytes)} of {show_bytes(unquantized_fit.free_bytes)}"
            yield _advise("method", "lora", f"it fits too ({room}): faster, and without 4-bit error")
    elif name in _SMALL_METHODS:
        reason = "few parameters are trained: if quality lags, try lora on all linear layers"
        yield _advise("method", "lora", reason)
    yield from _on_data(plan, facts)
    yield from unusual_values(plan, facts)


def unusual_values(plan: Plan, facts: Facts) -> Iterator[Decision]:
    """Yield warnings of values that are allowed and that nobody would choose: most are slips of the keyboard."""
    rank = int(plan.method.peft.arguments.get("r") or 0) if plan.method.peft is not None else 0
    smallest = min((min(m.d_in, m.d_out) for m in facts.model.shape.modules if is_adapted(m, plan)), default=rank)
    if rank > smallest:
        reason = f"more than the {smallest} of the smallest layer: its matrices have no more directions to learn"
        yield Decision(f"{WARNING}rank", rank, "decided", reason)


def _advise(topic: str, value: str, reason: str) -> Decision:
    return Decision(f"advice.{topic}", value, "decided", reason)


def _on_data(plan: Plan, facts: Facts) -> Iterator[Decision]:
    data, steps = facts.data, plan.train.num_steps
    if data is None or not steps:
        return
    epochs = num_epochs(plan, facts)
    if epochs > _MANY_EPOCHS:
        reason = f"every row is seen {epochs:.0f} times: held-out rows show when it only memorises"
        yield _advise("epochs", f"{epochs:.0f}", reason)
    num_trainable = plan.method.num_trainable or 0
    num_loss_tokens = data.lengths.num_learnt if data.lengths and data.lengths.source == "counted" else 0
    if plan.method.name in {"lora", "qlora"} and num_loss_tokens > num_trainable > 0:
        tokens = f"{show_count(num_loss_tokens)} tokens in the loss for {show_count(num_trainable)} trained parameters"
        reason = f"{tokens}: an adapter may run out of capacity (Schulman et al. 2025); a larger rank gives more"
        yield _advise("capacity", "a larger rank", reason)
