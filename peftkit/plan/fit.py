"""Does a plan fit on a device: the longest batch, the verdict, and the choice of `auto` values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from peftkit.plan.facts import DeviceFacts, Facts, Packs
from peftkit.plan.memory import Held, closed_form, evaluation_rows, held_by
from peftkit.plan.packing import best_sampling, mean_tokens, packs_of
from peftkit.plan.plan import Batch, Decision, Memory, Plan, TrainPlan
from peftkit.units import show_bytes

TIGHT = 0.08  # of the device's memory: below this margin a run may fail by fragmentation
_SLOWER = {"none": 1.0, "selective": 1.17, "full": 1.33}  # of a step: a third of the work is done again
_FULL_BATCH_TOKENS = 8192  # beyond so many tokens in a pass a device gains nothing more
# where plain states do not fit: in 8 bits, then paged to the host as well
_SMALLER_OPTIMIZERS = ("adamw_bnb_8bit", "paged_adamw_8bit")
_PASS_TOKENS = {"cuda": 512, "cpu": 32, "mps": 128}  # what starting a pass costs, in tokens of work


@dataclass(frozen=True)
class Fit:
    """The verdict for one device. `margin_bytes` is negative where something is missing."""

    verdict: str  # "fits" | "tight" | "does not fit"
    needed_bytes: int
    free_bytes: int

    @property
    def margin_bytes(self) -> int:
        return self.free_bytes - self.needed_bytes


def judge(memory: Memory, device: DeviceFacts) -> Fit:
    """Compare what is needed with what the device has free."""
    free = device.memory_bytes - device.used_bytes
    needed = memory.needed_bytes
    if device.kind != "cuda" and needed > free >= memory.peak.allocated_bytes + memory.context_bytes:
        return Fit("tight", needed, free)  # what glibc may keep of freed memory is an upper bound
    if needed > free:
        return Fit("does not fit", needed, free)
    return Fit("fits" if free - needed >= TIGHT * device.memory_bytes else "tight", needed, free)


def longest_batch(plan: Plan, facts: Facts) -> Batch:
    """The largest micro-batch that will come: the longest rows together.

    Without counted lengths every row is taken to be as long as it may be.
    """
    micro, lengths = plan.train.micro_batch, facts.data.lengths if facts.data else None
    if plan.train.packing:
        return _with_held_out(_longest_packs(plan, packs_of(lengths, plan.data.max_length)), plan, facts)
    if lengths is None:
        tokens = plan.data.max_length
        labels = tokens if plan.base.task == "seq2seq" else 0
        made = Batch(micro, tokens, labels, micro * (tokens - 1), is_padded=micro > 1)
        return _with_held_out(made, plan, facts)
    most, missing = plan.data.max_length, min(micro, lengths.num_rows) - len(lengths.longest)
    rows = [*lengths.longest[:micro], *[lengths.longest[-1]] * missing]
    tokens = min(rows[0].num_tokens, most)
    labels = min(max(row.num_labels for row in rows), most)
    learnt = sum(min(row.num_learnt, most) for row in rows)
    uneven = len({min(row.num_tokens, most) for row in rows}) > 1 or lengths.source != "counted"
    return _with_held_out(Batch(len(rows), tokens, labels, learnt, is_padded=uneven), plan, facts)


def _longest_packs(plan: Plan, packs: Packs | None) -> Batch:
    """The fullest packs together; where none are known, full ones."""
    micro, most = plan.train.micro_batch, plan.data.max_length
    if packs is None:
        return Batch(micro, most, 0, micro * (most - 1), is_padded=False, is_packed=True)
    rows = [packs.fullest[min(i, len(packs.fullest) - 1)] for i in range(min(micro, packs.num))]
    learnt = sum(row.num_learnt for row in rows)
    return Batch(len(rows), rows[0].num_tokens, 0, learnt, is_padded=False, is_packed=True)


def _with_held_out(batch: Batch, plan: Plan, facts: Facts) -> Batch:
    """With the held-out rows that are looked at together, as long as the longest where that is known."""
    if not plan.data.eval or (facts.data is not None and facts.data.num_eval == 0):
        return batch
    rows, row, most = evaluation_rows(plan), None, plan.data.max_length
    if facts.data is not None:
        rows, row = min(rows, facts.data.num_eval), facts.data.longest_eval
    if row is None:
        return replace(batch, eval_rows=rows, eval_tokens=batch.num_tokens, eval_labels=batch.num_labels)
    tokens, labels = min(row.num_tokens, most), min(row.num_labels, most)
    return replace(batch, eval_rows=rows, eval_tokens=tokens, eval_labels=labels)


def micro_batches(batch_size: int) -> list[int]:
    """Divisors, largest first: the accumulation must come out whole."""
    return [size for size in range(batch_size, 0, -1) if batch_size % size == 0]


def with_micro_batch(plan: Plan, size: int) -> Plan:
    """The same global batch in other pieces."""
    train = replace(plan.train, micro_batch=size, accumulation=plan.train.batch_size // size)
    return replace(plan, train=train)


def revised(plan: Plan, train: TrainPlan, facts: Facts, reason: str) -> Plan:
    """The plan with other values of `train`; the decisions that changed say why."""
    values = {
        "train.micro_batch": train.micro_batch,
        "train.accumulation": train.accumulation,
        "train.gradient_checkpointing": train.gradient_checkpointing,
        "train.learning_rate": train.learning_rate,
    }
    decisions = tuple(
        Decision(d.key, values[d.key], "decided", reason)
        if d.key in values and d.value != values[d.key] and str(d.value).lower() != str(values[d.key])
        else d
        for d in plan.decisions
    )
    made = replace(plan, train=train, decisions=decisions)
    return replace(made, batch=longest_batch(made, facts))


@dataclass(frozen=True)
class Free:
    """Which values the recipe leaves to the plan."""

    micro_batch: bool
    checkpointing: bool
    optimizer: bool = False


def _cost(plan: Plan, facts: Facts) -> float:
    """Time of a step per token, relative: work done again, padding, and passes that are too small."""
    tokens = plan.train.micro_batch * mean_tokens(plan, facts)
    sampling, shares = best_sampling(plan, facts)
    start = _PASS_TOKENS.get(facts.device.kind, 64)
    return _SLOWER[plan.train.gradient_checkpointing] / (1 - shares.get(sampling, 0.0)) * (1 + start / tokens)


def _variants(plan: Plan, free: Free, *, checkpoints: bool) -> Iterator[Plan]:
    sizes = micro_batches(plan.train.batch_size) if free.micro_batch else [plan.train.micro_batch]
    given = plan.train.gradient_checkpointing
    modes = [*_SLOWER] if free.checkpointing and checkpoints else [given]
    optimizers = [plan.train.optimizer, *(_SMALLER_OPTIMIZERS if free.optimizer else ())]
    for optimizer, size, mode in product(optimizers, sizes, modes):
        made = with_micro_batch(plan, size)
        yield replace(made, train=replace(made.train, gradient_checkpointing=mode, optimizer=optimizer))


def choose(plan: Plan, facts: Facts, free: Free, *, checkpoints: bool) -> tuple[Plan, str]:
    """(the fastest variant that fits with a margin, why); the smallest where none does.

    `checkpoints` tells whether the method can recompute activations.
    """
    shape = facts.model.shape
    best: tuple[tuple[int, float], Plan] | None = None
    smallest: tuple[int, Plan] | None = None
    fixed: dict[str, Held] = {}
    for variant in _variants(plan, free, checkpoints=checkpoints):
        smaller = variant.train.optimizer in _SMALLER_OPTIMIZERS
        rank = 1 + _SMALLER_OPTIMIZERS.index(variant.train.optimizer) if smaller else 0
        if best is not None and rank > best[0][0]:
            break  # smaller states are for where larger ones fit in no variant
        batch = longest_batch(variant, facts)
        too_large = batch.num_rows * batch.num_tokens > _FULL_BATCH_TOKENS
        if free.micro_batch and too_large and variant.train.micro_batch > 1:
            continue
        name = variant.train.optimizer
        fixed[name] = fixed.get(name) or held_by(shape, variant)
        memory = closed_form(shape, variant, batch, fixed=fixed[name])
        fit = judge(memory, facts.device)
        if smallest is None or fit.needed_bytes < smallest[0]:
            smallest = (fit.needed_bytes, variant)
        cost = (rank, _cost(variant, facts))
        if fit.verdict == "fits" and (best is None or cost < best[0]):
            best = (cost, variant)
    assert smallest is not None
    chosen = best[1] if best is not None else smallest[1]
    needed = judge(closed_form(shape, chosen, longest_batch(chosen, facts)), facts.device)
    room = f"{show_bytes(needed.needed_bytes)} of {show_bytes(needed.free_bytes)}"
    if best is None:
        return chosen, f"the least memory that these values allow ({room})"
    return chosen, f"the fastest that fits with a margin ({room})"
