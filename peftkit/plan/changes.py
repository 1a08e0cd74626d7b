"""What would fit: the nearest changes to a recipe, each planned anew, cheapest in quality and speed first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peftkit.errors import UserError
from peftkit.plan.facts import Facts
from peftkit.plan.fit import judge, micro_batches
from peftkit.plan.plan import Plan
from peftkit.plan.resolve import make_plan
from peftkit.recipe import LoadedRecipe, load

_ENOUGH = 4  # changes that are shown


@dataclass(frozen=True)
class Change:
    """Overrides that make a recipe smaller, what they cost, and what is needed then."""

    overrides: tuple[str, ...]
    cost: str
    needed_bytes: int
    verdict: str


def _steps(plan: Plan) -> Iterator[tuple[tuple[str, ...], str]]:
    """(overrides, cost) in the order of what they cost."""
    train, method = plan.train, plan.method
    smaller = [size for size in micro_batches(train.batch_size) if size < train.micro_batch]
    if smaller:
        yield (f"train.micro_batch={smaller[-1]}",), "the same batch in smaller pieces: a little slower"
    if plan.base.attention == "eager":
        yield ("base.attention=auto",), "the same numbers, faster"
    if train.gradient_checkpointing != "full" and method.name != "prefix":
        yield ("train.gradient_checkpointing=true",), "activations are worked out again: a third slower"
    if plan.device == "cuda" and "8bit" not in train.optimizer and method.lr_ratio is None:
        yield ("train.optimizer=paged_adamw_8bit",), "optimizer states in 8 bits, paged to the host"
    if method.peft is None:
        yield ("method.name=lora",), "an adapter instead of the whole model: less capacity"
    if plan.base.quant_type is None and method.name in {"lora", "full"}:
        yield ("method.name=qlora",), "the base in 4 bits: a little less exact, slower"
    if plan.data.max_length > 512:
        yield (f"train.max_length={plan.data.max_length // 2}",), "longer rows are dropped or cut"
    rank = method.peft.arguments.get("r", 0) if method.peft is not None else 0
    if rank > 8:
        yield (f"method.rank={rank // 2}",), "a smaller adapter: less capacity"


def nearest_changes(loaded: LoadedRecipe, facts: Facts, plan: Plan) -> list[Change]:
    """The first few changes that fit alone, then what all of them together would need.

    Pure: each is a plan of the recipe with overrides, which are what a user would type.
    """
    found: list[Change] = []
    together: list[str] = []
    for overrides, cost in _steps(plan):
        alone = _planned(loaded, facts, overrides, cost)
        if alone is not None and alone.verdict != "does not fit":
            found.append(alone)
        together = [text for text in together if text.split("=")[0] != overrides[0].split("=")[0]]
        together += overrides
        if len(together) > 1 and not found:
            both = _planned(loaded, facts, tuple(together), "all of these")
            if both is not None and both.verdict != "does not fit":
                found.append(both)
        if len(found) == _ENOUGH:
            break
    return found


def _planned(loaded: LoadedRecipe, facts: Facts, overrides: tuple[str, ...], cost: str) -> Change | None:
    try:
        changed = load(loaded.recipe, list(overrides))
        plan = make_plan(changed, facts)
    except UserError:
        return None  # not possible with this recipe
    assert plan.memory is not None
    fit = judge(plan.memory, facts.device)
    return Change(overrides, cost, fit.needed_bytes, fit.verdict)
