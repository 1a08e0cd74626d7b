"""A candidate: the plan of a larger adapter, with its overrides, its cost, and what forbids it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

from peftkit.diagnose.causes import RATE_FACTOR
from peftkit.diagnose.escalation import RANKS, Rung, UntrainedTokens, next_rung
from peftkit.diagnose.signals import Signals
from peftkit.diagnose.verdict import Cost
from peftkit.errors import UserError
from peftkit.methods import METHODS
from peftkit.methods.base import RunSize
from peftkit.methods.lora import LoraOptions
from peftkit.plan import Plan, make_plan
from peftkit.plan.fit import check_fit
from peftkit.plan.memory import closed_form_memory
from peftkit.plan.packing import mean_row_tokens
from peftkit.plan.rate import with_found_rate
from peftkit.plan.throughput import flops_per_token
from peftkit.prepare.context import RunContext
from peftkit.recipe import load
from peftkit.units import show_bytes, show_count

METHODS_WITHOUT_RANK = ("prefix", "prompt", "ia3", "ln", "vera", "oft")


@dataclass(frozen=True)
class Candidate:
    """A larger adapter. `plan` is None where something forbids it, which `refusal` says."""

    overrides: tuple[str, ...]
    plan: Plan | None
    refusal: str = ""

    def cost(self, context: RunContext) -> Cost | None:
        """Return the parameters, bytes and work per step that it adds to the run's plan."""
        if self.plan is None:
            return None
        run_plan, shape = context.plan, context.facts.model.shape
        assert self.plan.memory is not None and run_plan.memory is not None
        added_parameters = (self.plan.method.num_trainable or 0) - (run_plan.method.num_trainable or 0)
        added_bytes = self.plan.memory.needed_bytes - run_plan.memory.needed_bytes
        length = mean_row_tokens(run_plan, context.facts)
        token_flops = [flops_per_token(shape, plan, length) for plan in (run_plan, self.plan)]
        return Cost(added_parameters, added_bytes, token_flops[1] / token_flops[0])


def plan_candidate(context: RunContext, rung: Rung) -> Candidate:
    """Plan a rung within the recipe's bounds, trying smaller ranks where a larger one is too much."""
    options = context.loaded.recipe.method
    if not isinstance(options, LoraOptions):
        return Candidate((), None, f"{options.name} has no rank")
    spec = context.plan.method.peft
    assert spec is not None
    current_rank = int(spec.arguments["r"])
    ranks = [rung.rank, *(rank for rank in reversed(RANKS) if current_rank < rank < rung.rank)]
    if rung.cause != "rank" and current_rank not in ranks:
        ranks.append(current_rank)
    candidate = Candidate((), None, "no larger rank is within the bound")
    for rank in ranks:
        candidate = _plan_rung(context, rung, rank)
        if candidate.plan is not None:
            return candidate
    return candidate


def _plan_rung(context: RunContext, rung: Rung, rank: int) -> Candidate:
    """Plan a rung at a rank, or return a candidate with what forbids it."""
    options = context.loaded.recipe.method
    assert isinstance(options, LoraOptions)
    # the rung in the recipe's own keys
    spec = context.plan.method.peft
    assert spec is not None
    current_rank, alpha = int(spec.arguments["r"]), float(spec.arguments["lora_alpha"])
    changes = []
    if rung.roles:
        changes.append(f"method.targets=[{', '.join(rung.roles)}]")
    if rank != current_rank or options.rank == "auto":
        ratio = math.sqrt(rank / current_rank) if options.rslora else rank / current_rank
        changes.append(f"method.rank={rank}")
        if alpha * ratio != 2.0 * rank or options.alpha is not None:  # else each module's follows from its rank
            changes.append(f"method.alpha={alpha * ratio:.6g}")
    additions: list[object] = [*rung.also_train, *([{"tokens": list(rung.tokens)}] if rung.tokens else [])]
    if additions:
        configured = options.model_dump(mode="json")["also_train"]
        entries = [*configured, *(item for item in additions if item not in configured)]
        changes.append(f"method.also_train={json.dumps(entries, ensure_ascii=False)}")
    overrides = tuple(changes)
    earlier_overrides = [override for growth in context.plan.growths if growth.kept for override in growth.overrides]
    try:
        rung_plan = make_plan(load(context.loaded.recipe, [*earlier_overrides, *overrides]), context.facts)
    except UserError as error:
        return Candidate(overrides, None, "; ".join(f"{p.where}: {p.got}" for p in error.problems))
    plan = plan_with_method(context, rung_plan, rate=scaled_learning_rate(context.plan, rank))
    limits, num_trainable = context.plan.diagnose, plan.method.num_trainable or 0
    assert plan.memory is not None
    if limits.max_trainable is not None and num_trainable > limits.max_trainable:
        message = f"{show_count(num_trainable)} trainable parameters, more than {show_count(limits.max_trainable)}"
        return Candidate(overrides, None, message)
    if limits.max_memory_bytes is not None and plan.memory.needed_bytes > limits.max_memory_bytes:
        message = f"{show_bytes(plan.memory.needed_bytes)}, more than {show_bytes(limits.max_memory_bytes)}"
        return Candidate(overrides, None, message)
    if check_fit(plan.memory, context.facts.device).verdict == "does not fit":
        return Candidate(overrides, None, f"{show_bytes(plan.memory.needed_bytes)}, which does not fit")
    return Candidate((*overrides, f"train.learning_rate={plan.train.learning_rate:.6g}"), plan)


def scaled_learning_rate(plan: Plan, rank: int) -> float:
    """Return the learning rate at another rank r' and the same scale: rate * sqrt(r / r').

    See docs/diagnosis.md.
    """
    spec = plan.method.peft
    assert spec is not None
    return plan.train.learning_rate * math.sqrt(int(spec.arguments["r"]) / rank)


def rate_to_try(context: RunContext, *, lower: bool) -> float:
    """Return the learning rate to try in mid-run: the law's where it differs by more than two, else three times.

    The law is the method's own: docs/quality.md.
    """
    plan, recipe = context.plan, context.loaded.recipe.method
    options = recipe.model_copy(update={"rank": adapter_rank(plan)}) if isinstance(recipe, LoraOptions) else recipe
    size = RunSize(plan.train.num_steps, plan.train.batch_size)
    usual, _ = METHODS[plan.method.name].learning_rate(options, context.facts.model.shape, size)
    rate = plan.train.learning_rate
    if lower:
        return usual if usual < rate / 2 else rate / RATE_FACTOR
    return usual if usual > rate * 2 else rate * RATE_FACTOR


def adapter_rank(plan: Plan) -> int:
    """Return the rank of the run's adapter; 0 for a method without one."""
    spec = plan.method.peft
    return int(spec.arguments.get("r", 0)) if spec is not None and spec.class_name == "LoraConfig" else 0


def choose_rung(
    context: RunContext, signals: Signals, *, loss: float, early: bool, untrained_tokens: UntrainedTokens
) -> Rung | None:
    """Choose the larger adapter that the signals name; None for a method without a rank, or beyond the bound."""
    plan, shape, rank = context.plan, context.facts.model.shape, adapter_rank(context.plan)
    if not rank:
        return None
    roles = {module.role for module in shape.modules}
    return next_rung(
        signals,
        rank=rank,
        adapted_roles=tuple(role for role in plan.method.trainable_by_role or {} if role in roles),
        max_rank=plan.diagnose.max_rank,
        num_loss_tokens=context.prepared.num_learnt,
        loss=loss,
        early=early,
        untrained_tokens=untrained_tokens,
    )


def plan_with_method(context: RunContext, method_plan: Plan, *, rate: float) -> Plan:
    """Return the run's plan with the method of another plan; batches and schedule stay as they are."""
    plan = context.plan
    method_decisions = {
        decision.key: decision for decision in method_plan.decisions if decision.key.startswith("method.")
    }
    decisions = [method_decisions.pop(one.key, one) for one in plan.decisions]
    combined_plan = with_found_rate(
        replace(plan, method=method_plan.method, decisions=(*decisions, *method_decisions.values())),
        rate,
        "the rate of the old rank, scaled by the root of the ranks",
    )
    assert plan.batch is not None
    return replace(combined_plan, memory=closed_form_memory(context.facts.model.shape, combined_plan, plan.batch))


def next_method(context: RunContext) -> tuple[tuple[str, ...], Cost] | None:
    """Return overrides for LoRA at its defaults and their cost, for methods without a rank; else None."""
    if context.plan.method.name not in METHODS_WITHOUT_RANK:
        return None
    overrides = ("method=lora", "train.learning_rate=auto")
    try:
        lora_plan = make_plan(load(context.loaded.recipe, overrides), context.facts)
    except UserError:
        return None  # LoRA does not go with this model
    cost = Candidate(overrides, lora_plan).cost(context)
    assert cost is not None
    return overrides, cost
