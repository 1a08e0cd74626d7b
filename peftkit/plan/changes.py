"""Nearest changes to a recipe that would fit, each planned anew, in order of their cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftkit.errors import UserError
from peftkit.plan.facts import Facts
from peftkit.plan.fit import check_fit, micro_batches
from peftkit.plan.plan import Plan
from peftkit.plan.resolve import make_plan
from peftkit.recipe import LoadedRecipe, load

_MAX_CHANGES = 4  # changes that are shown
_MIN_ROW_TOKENS = 256  # tokens: rows are not cut shorter than this to fit
_MIN_RANK = 4


@dataclass(frozen=True)
class Change:
    """Overrides that make a recipe smaller, their cost in words, and the bytes needed then."""

    overrides: tuple[str, ...]
    cost: str
    needed_bytes: int
    verdict: str


CandidateChanges = Iterator[tuple[list[str], str]]


def _candidate_changes(plan: Plan) -> CandidateChanges:
    """Yield (overrides of one key, the nearest first; cost), ordered by what they cost."""
    train, method = plan.train, plan.method
    smaller = [size for size in micro_batches(train.batch_size) if size < train.micro_batch]
    if smaller:
        cost = "the same batch in smaller micro-batches: a little slower"
        yield [f"train.micro_batch={size}" for size in smaller], cost
    if plan.base.attention == "eager":
        yield ["base.attention=auto"], "the same numbers, faster"
    if train.gradient_checkpointing != "full" and method.name != "prefix":
        yield ["train.gradient_checkpointing=true"], "activations are recomputed: a third slower"
    if plan.device == "cuda" and "8bit" not in train.optimizer and method.lr_ratio is None:
        yield ["train.optimizer=paged_adamw_8bit"], "optimizer states in 8 bits, paged to the host"
    if method.peft is None:
        yield ["method.name=lora"], "an adapter instead of the whole model: less capacity"
    if plan.base.quant_type is None and method.name in {"lora", "full"}:
        yield ["method.name=qlora"], "the base in 4 bits: a little less exact, slower"
    lengths = [plan.data.max_length // part for part in (2, 4, 8) if plan.data.max_length // part >= _MIN_ROW_TOKENS]
    if lengths:
        yield [f"train.max_length={length}" for length in lengths], "longer rows are dropped or cut"
    rank = method.peft.arguments.get("r", 0) if method.peft is not None else 0
    if rank > _MIN_RANK:
        ranks = [rank // part for part in (2, 4) if rank // part >= _MIN_RANK]
        yield [f"method.rank={smaller_rank}" for smaller_rank in ranks], "a smaller adapter: less capacity"


def nearest_changes(loaded: LoadedRecipe, facts: Facts, plan: Plan) -> list[Change]:
    """Return the first few changes that fit alone; before there is one, a combination that fits.

    Pure: each is a plan of the recipe with overrides, which are what a user would type.
    """
    changes: list[Change] = []
    combined_overrides: dict[str, str] = {}
    for values, cost in _candidate_changes(plan):
        change = _first_fitting_change(loaded, facts, [(value,) for value in values], cost)
        combined_overrides[values[0].split("=")[0]] = values[-1]
        if change is None and not changes and len(combined_overrides) > 1:
            change = _first_fitting_change(loaded, facts, [tuple(combined_overrides.values())], "all of these")
        if change is not None:
            changes.append(change)
        if len(changes) == _MAX_CHANGES:
            break
    return changes


def _first_fitting_change(
    loaded: LoadedRecipe, facts: Facts, choices: Sequence[tuple[str, ...]], cost: str
) -> Change | None:
    for overrides in choices:
        try:
            plan = make_plan(load(loaded.recipe, list(overrides)), facts)
        except UserError:
            continue  # not possible with this recipe
        assert plan.memory is not None
        fit = check_fit(plan.memory, facts.device)
        if fit.verdict != "does not fit":
            return Change(overrides, cost, fit.needed_bytes, fit.verdict)
    return None
