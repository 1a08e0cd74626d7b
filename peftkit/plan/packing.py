"""Against padding: examples packed into full rows, or rows of like length taken together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from peftkit.methods import Method
from peftkit.plan.decisions import Decisions
from peftkit.plan.facts import Facts, Lengths, Packs, Row
from peftkit.plan.plan import Plan
from peftkit.units import divisors

RANDOM, BY_LENGTH = "random", "by length"
_FULL = 0.98  # of a pack's room, where the rows are not laid together yet: best-fit decreasing leaves less
_MUCH_PADDING = 0.05  # of a micro-batch: from here on rows of like length are taken together
_STILL_MUCH = 0.10  # what padding must be left then, for a GPU to pack
WINDOW_STEPS = 50  # of which the rows are sorted by length
_WINDOW_ROWS = 1000  # so many places tell enough


@dataclass(frozen=True)
class Rows:
    """What the trainer's rows are: examples, or packs of them. `num` is None where the data is not known."""

    packing: bool
    num: int | None
    batch_size: int


def packs_of(lengths: Lengths | None, room: int) -> Packs | None:
    """The packs of rows of these lengths: counted, or about so many; None where no length is known."""
    if lengths is None:
        return None
    if lengths.packs is not None and lengths.packs.room == room:
        return lengths.packs
    tokens = min(lengths.mean, room) * lengths.num_rows
    num = max(1, min(lengths.num_rows, round(tokens / room / _FULL)))
    fullest = room if num > 1 else min(room, round(tokens))
    learnt = round(fullest * min(1.0, lengths.num_learnt / lengths.num_tokens))
    return Packs(room, num, (Row(fullest, 0, learnt),))


def num_rows(plan: Plan, facts: Facts) -> int | None:
    """How many rows the trainer has: examples or packs; None where that is not known."""
    if facts.data is None:
        return None
    packs = packs_of(facts.data.lengths, plan.data.max_length) if plan.train.packing else None
    return packs.num if packs else facts.data.num_train


def mean_tokens(plan: Plan, facts: Facts) -> float:
    """Tokens of one of the trainer's rows."""
    most, lengths = plan.data.max_length, facts.data.lengths if facts.data else None
    if lengths is None:
        return most
    mean = min(lengths.mean, most)
    return mean * lengths.num_rows / (num_rows(plan, facts) or 1) if plan.train.packing else mean


def _obstacle(d: Decisions, facts: Facts, method: Method) -> tuple[str, str]:
    """(what packing does not go with, why); empty where it does."""
    shape = facts.model.shape
    if shape.task != "causal-lm":
        return shape.task, "only a decoder reads several documents in one row"
    if shape.family.inferred:
        return "a model of no known family", "whether its documents would see each other is not known"
    if not shape.family.packs:
        return shape.family.name, "the documents of a pack would see each other in this family"
    if method.virtual_tokens:
        return f"method {method.name}", "only the first document of a pack would see the virtual tokens"
    if facts.data is not None and facts.data.weighted:
        return "weighted rows", "their loss is another trainer's, which does not pack"
    also = getattr(d.loaded.recipe.method, "also_train", [])
    if any(not isinstance(item, str) for item in also):
        return "also_train with tokens", "single tokens' rows have another trainer, which does not pack"
    return "", ""


def choose_rows(d: Decisions, facts: Facts, method: Method, max_length: int, batch_size: int) -> Rows:
    """Whether examples are packed, and then how many packs hold about `batch_size` of them."""
    train, data = d.loaded.recipe.train, facts.data
    plain = Rows(False, data.num_train if data else None, batch_size)
    what, why = _obstacle(d, facts, method)
    if train.packing is True and what:
        d.refuse("train.packing", f"true with {what}", "false or auto", why)
        return plain
    if train.packing == "auto":
        best, reason = (False, f"not with {what}: {why}") if what else _auto(d, facts, max_length, batch_size)
    else:
        best, reason = train.packing, ""
    if not d.keep("train.packing", train.packing, best, reason):
        return plain
    return _packed(d, facts, max_length, batch_size)


def _auto(d: Decisions, facts: Facts, max_length: int, batch_size: int) -> tuple[bool, str]:
    """Not on a CPU, where it was measured slower; on a GPU, where it was not measured, for much padding."""
    lengths = facts.data.lengths if facts.data else None
    if facts.device.kind == "cpu":
        return False, "on a CPU rows of like length together were measured faster (docs/packing.md)"
    if facts.device.kind != "cuda":
        return False, f"not measured on {facts.device.kind}"
    if lengths is None or d.loaded.recipe.train.micro_batch != "auto":
        return False, "the rows' lengths are not known" if lengths is None else "train.micro_batch is given"
    left = padding(lengths, max_length, micro=batch_size, step=batch_size, sampling=BY_LENGTH)
    told = f"{100 * left:.0f} % of a batch would be padding, with rows of like length together"
    return left > _STILL_MUCH, f"{told} (a rule: this was not measured on a GPU)"


def _packed(d: Decisions, facts: Facts, max_length: int, batch_size: int) -> Rows:
    """How many packs hold about so many examples. A given micro-batch is judged once tokens are counted."""
    lengths = facts.data.lengths if facts.data else None
    packs = packs_of(lengths, max_length)
    if lengths is None or packs is None:
        num = facts.data.num_train if facts.data else None
        d.decide("train.packs_per_step", batch_size, "one example in each, as long as no lengths are known")
        return Rows(True, num, batch_size)
    many = batch_size * packs.num / lengths.num_rows
    size, counted = max(1, round(many)), lengths.source == "counted"
    about = f"{'about' if counted else 'at most'} {many:.1f} packs of {max_length:,} tokens"
    d.decide("train.packs_per_step", size, f"{batch_size} examples are {about}")
    micro = d.loaded.recipe.train.micro_batch
    if counted and isinstance(micro, int) and size % micro:
        best = next(one for one in divisors(size) if one <= micro)
        fix = f"try micro_batch: {best}, or another batch_size: {batch_size} examples are {about}"
        d.refuse("train.micro_batch", f"{micro} with {size} packs a step", f"a divisor of {size}", fix)
    return Rows(True, packs.num, size)


@lru_cache(maxsize=256)  # many variants of a plan ask the same
def padding(lengths: Lengths, most: int, *, micro: int, step: int, sampling: str) -> float:
    """The share of padding in micro-batches of `micro` rows, `step` of them to an optimizer step.

    No row exceeds `most`. At random the longest of each micro-batch counts; by length rows are sorted in
    windows of many steps.
    """
    step = min(step, lengths.num_rows)
    window = step * max(1, min(WINDOW_STEPS, lengths.num_rows // step))
    num = window if sampling == BY_LENGTH else _WINDOW_ROWS
    if num > _WINDOW_ROWS:  # the same picture in fewer places
        micro, num = max(1, round(micro * _WINDOW_ROWS / num)), _WINDOW_ROWS
    rows = sorted((min(most, lengths.at((place + 0.5) / num)) for place in range(num)), reverse=True)
    if sampling == BY_LENGTH:
        pieces = [rows[start : start + micro] for start in range(0, num, micro)]
        held = sum(piece[0] * len(piece) for piece in pieces)
    else:
        none_longer = [(1 - i / num) ** micro for i in range(num + 1)]  # in the micro-batch than the i-th
        held = num * sum(row * (none_longer[i] - none_longer[i + 1]) for i, row in enumerate(rows))
    return max(0.0, 1 - sum(rows) / held)


def best_sampling(plan: Plan, facts: Facts) -> tuple[str, Mapping[str, float]]:
    """(how the trainer draws rows, the share of padding for each way)."""
    lengths, train = facts.data.lengths if facts.data else None, plan.train
    if lengths is None or train.packing or train.micro_batch == 1:
        return RANDOM, {}
    most = plan.data.max_length
    shares = {
        one: padding(lengths, most, micro=train.micro_batch, step=train.batch_size, sampling=one)
        for one in (RANDOM, BY_LENGTH)
    }
    return BY_LENGTH if shares[RANDOM] > _MUCH_PADDING else RANDOM, shares


def choose_sampling(d: Decisions, plan: Plan, facts: Facts) -> Plan:
    """The plan with how rows are drawn, once the micro-batch is decided."""
    sampling, shares = best_sampling(plan, facts)
    if shares:
        told = {name: f"{100 * share:.0f} %" for name, share in shares.items()}
        reason = f"about {told[RANDOM]} of a micro-batch is padding at random, {told[BY_LENGTH]} by length"
    elif plan.train.packing:
        reason = "packs are all about as long"
    else:
        alone = plan.train.micro_batch == 1
        reason = "one row at a time has no padding" if alone else "the rows' lengths are not known"
    d.decide("train.sampling", sampling, reason)
    return replace(plan, train=replace(plan.train, sampling=sampling))
