"""What would fit: the nearest changes to a recipe, each planned anew, cheapest in quality and speed first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftkit.errors import UserError
from peftkit.plan.facts import Facts
from peftkit.plan.fit import judge, micro_batches
from peftkit.plan.plan import Plan
from peftkit.plan.resolve import make_plan
from peftkit.recipe import LoadedRecipe, load

_ENOUGH = 4  # changes that are shown
_SHORT = 256  # tokens: rows are not cut shorter than this to fit
_SMALL_RANK = 4


@dataclass(frozen=True)
class Change:
    """Overrides that make a recipe smaller, what they cost, and what is needed then."""

    overrides: tuple[str, ...]
    cost: str
    needed_bytes: int
    verdict: str


Steps = Iterator[tuple[list[str], str]]


def _steps(plan: Plan) -> Steps:
    """(values of one key, the nearest first; cost) in the order of what they cost."""
    train, method = plan.train, plan.method
    smaller = [size for size in micro_batches(train.batch_size) if size < train.micro_batch]
    if smaller:
        cost = "the same batch in smaller pieces: a little slower"
        yield [f"train.micro_batch={size}" for size in smaller], cost
    if plan.base.attention == "eager":
        yield ["base.attention=auto"], "the same numbers, faster"
    if train.gradient_checkpointing != "full" and method.name != "prefix":
        yield ["train.gradient_checkpointing=true"], "activations are worked out again: a third slower"
    if plan.device == "cuda" and "8bit" not in train.optimizer and method.lr_ratio is None:
        yield ["train.optimizer=paged_adamw_8bit"], "optimizer states in 8 bits, paged to the host"
    if method.peft is None:
        yield ["method.name=lora"], "an adapter instead of the whole model: less capacity"
    if plan.base.quant_type is None and method.name in {"lora", "full"}:
        yield ["method.name=qlora"], "the base in 4 bits: a little less exact, slower"
    lengths = [plan.data.max_length // part for part in (2, 4, 8) if plan.data.max_length // part >= _SHORT]
    if lengths:
        yield [f"train.max_length={length}" for length in lengths], "longer rows are dropped or cut"
    rank = method.peft.arguments.get("r", 0) if method.peft is not None else 0
    if rank > _SMALL_RANK:
        ranks = [rank // part for part in (2, 4) if rank // part >= _SMALL_RANK]
        yield [f"method.rank={one}" for one in ranks], "a smaller adapter: less capacity"


def nearest_changes(loaded: LoadedRecipe, facts: Facts, plan: Plan) -> list[Change]:
    """The first few changes that fit alone; before there is one, what fits together with those before it.

    Pure: each is a plan of the recipe with overrides, which are what a user would type.
    """
    found: list[Change] = []
    together: dict[str, str] = {}
    for values, cost in _steps(plan):
        alone = _first_that_fits(loaded, facts, [(value,) for value in values], cost)
        together[values[0].split("=")[0]] = values[-1]
        if alone is None and not found and len(together) > 1:
            alone = _first_that_fits(loaded, facts, [tuple(together.values())], "all of these")
        if alone is not None:
            found.append(alone)
        if len(found) == _ENOUGH:
            break
    return found


def _first_that_fits(
    loaded: LoadedRecipe, facts: Facts, choices: Sequence[tuple[str, ...]], cost: str
) -> Change | None:
    for overrides in choices:
        change = _planned(loaded, facts, overrides, cost)
        if change is not None and change.verdict != "does not fit":
            return change
    return None


def _planned(loaded: LoadedRecipe, facts: Facts, overrides: tuple[str, ...], cost: str) -> Change | None:
    try:
        changed = load(loaded.recipe, list(overrides))
        plan = make_plan(changed, facts)
    except UserError:
        return None  # not possible with this recipe
    assert plan.memory is not None
    fit = judge(plan.memory, facts.device)
    return Change(overrides, cost, fit.needed_bytes, fit.verdict)
