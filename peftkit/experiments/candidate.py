"""A rung as a plan: what the recipe would say, what it would take, and what forbids it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

from peftkit.diagnose.escalation import RANKS, Rung
from peftkit.diagnose.verdict import Cost
from peftkit.errors import UserError
from peftkit.methods.lora import LoraOptions
from peftkit.plan import Decision, Plan, make_plan
from peftkit.plan.fit import judge
from peftkit.plan.memory import closed_form
from peftkit.plan.packing import mean_tokens
from peftkit.plan.throughput import flops_per_token
from peftkit.prepare.context import Stage
from peftkit.recipe import load
from peftkit.units import show_bytes, show_count

WITHOUT_RANK = ("prefix", "prompt", "ia3", "ln", "vera", "oft")


@dataclass(frozen=True)
class Candidate:
    """A larger adapter. `plan` is None where something forbids it, which `refused` says."""

    overrides: tuple[str, ...]
    plan: Plan | None
    refused: str = ""

    def cost(self, stage: Stage) -> Cost | None:
        """What it adds to the run's plan."""
        if self.plan is None:
            return None
        before, shape = stage.plan, stage.facts.model.shape
        assert self.plan.memory is not None and before.memory is not None
        added = (self.plan.method.num_trainable or 0) - (before.method.num_trainable or 0)
        more = self.plan.memory.needed_bytes - before.memory.needed_bytes
        length = mean_tokens(before, stage.facts)
        work = [flops_per_token(shape, plan, length) for plan in (before, self.plan)]
        return Cost(added, more, work[1] / work[0])


def candidate_of(stage: Stage, rung: Rung) -> Candidate:
    """The rung within the recipe's bounds: a smaller rank is tried where the larger one is too much."""
    options = stage.loaded.recipe.method
    if not isinstance(options, LoraOptions):
        return Candidate((), None, f"{options.name} has no rank")
    spec = stage.plan.method.peft
    assert spec is not None
    now = int(spec.arguments["r"])
    ranks = [rung.rank, *(rank for rank in reversed(RANKS) if now < rank < rung.rank)]
    if rung.cause != "rank" and now not in ranks:
        ranks.append(now)
    made = Candidate((), None, "there is no larger rank within the bound")
    for rank in ranks:
        made = _planned(stage, rung, rank)
        if made.plan is not None:
            return made
    return made


def _planned(stage: Stage, rung: Rung, rank: int) -> Candidate:
    """A rung at a rank, or what forbids it."""
    options = stage.loaded.recipe.method
    assert isinstance(options, LoraOptions)
    overrides = _overrides(stage.plan, options, rung, rank)
    earlier = [text for growth in stage.plan.growths if growth.kept for text in growth.overrides]
    try:
        made = make_plan(load(stage.loaded.recipe, [*earlier, *overrides]), stage.facts)
    except UserError as error:
        return Candidate(overrides, None, "; ".join(f"{p.where}: {p.got}" for p in error.problems))
    plan = grown_plan(stage, made, rate=rate_for(stage.plan, rank))
    wanted, trainable = stage.plan.diagnose, plan.method.num_trainable or 0
    assert plan.memory is not None
    if wanted.max_trainable is not None and trainable > wanted.max_trainable:
        said = f"{show_count(trainable)} trainable parameters, more than {show_count(wanted.max_trainable)}"
        return Candidate(overrides, None, said)
    if wanted.max_memory_bytes is not None and plan.memory.needed_bytes > wanted.max_memory_bytes:
        said = f"{show_bytes(plan.memory.needed_bytes)}, more than {show_bytes(wanted.max_memory_bytes)}"
        return Candidate(overrides, None, said)
    if judge(plan.memory, stage.facts.device).verdict == "does not fit":
        return Candidate(overrides, None, f"{show_bytes(plan.memory.needed_bytes)}, which does not fit")
    return Candidate((*overrides, f"train.learning_rate={plan.train.learning_rate:.6g}"), plan)


def _overrides(plan: Plan, options: LoraOptions, rung: Rung, rank: int) -> tuple[str, ...]:
    """The rung in the recipe's own keys. The scale stays: alpha grows as the rank, or its root, does."""
    spec = plan.method.peft
    assert spec is not None
    now, alpha = int(spec.arguments["r"]), float(spec.arguments["lora_alpha"])
    found = []
    if rung.roles:
        found.append(f"method.targets=[{', '.join(rung.roles)}]")
    if rank != now:
        times = math.sqrt(rank / now) if options.rslora else rank / now
        found += [f"method.rank={rank}", f"method.alpha={alpha * times:.6g}"]
    more: list[object] = [*rung.also_train, *([{"tokens": list(rung.tokens)}] if rung.tokens else [])]
    if more:
        kept = options.model_dump(mode="json")["also_train"]
        listed = [*kept, *(item for item in more if item not in kept)]
        found.append(f"method.also_train={json.dumps(listed, ensure_ascii=False)}")
    return tuple(found)


def rate_for(plan: Plan, rank: int) -> float:
    """The learning rate at another rank and the same scale: by the root of the ranks (docs/diagnosis.md)."""
    spec = plan.method.peft
    assert spec is not None
    return plan.train.learning_rate * math.sqrt(int(spec.arguments["r"]) / rank)


def grown_plan(stage: Stage, made: Plan, *, rate: float) -> Plan:
    """The run's plan with the method of another one: batches, schedule and all else stay as they are."""
    plan = stage.plan
    changed = {decision.key: decision for decision in made.decisions if decision.key.startswith("method.")}
    decisions = [changed.pop(one.key, one) for one in plan.decisions]
    why = "the rate of the old rank, scaled by the root of the ranks"
    decisions = [
        Decision("train.learning_rate", rate, "decided", why) if one.key == "train.learning_rate" else one
        for one in [*decisions, *changed.values()]
    ]
    grown = replace(
        plan,
        method=made.method,
        train=replace(plan.train, learning_rate=rate),
        decisions=tuple(decisions),
    )
    assert plan.batch is not None
    return replace(grown, memory=closed_form(stage.facts.model.shape, grown, plan.batch))


def next_method(stage: Stage) -> tuple[tuple[str, ...], Cost] | None:
    """For a method without a rank: LoRA at its defaults, and what that adds; None for others."""
    if stage.plan.method.name not in WITHOUT_RANK:
        return None
    overrides = ("method=lora", "train.learning_rate=auto")
    try:
        made = make_plan(load(stage.loaded.recipe, overrides), stage.facts)
    except UserError:
        return None  # LoRA does not go with this model
    cost = Candidate(overrides, made).cost(stage)
    assert cost is not None
    return overrides, cost
