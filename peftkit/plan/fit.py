"""Fit of a plan on a device: the longest batch, the verdict, and the choice of `auto` values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from peftkit.plan.facts import DeviceFacts, Facts
from peftkit.plan.memory import FixedMemory, closed_form_memory, evaluation_rows, fixed_memory
from peftkit.plan.packing import best_sampling, estimate_packs, mean_row_tokens
from peftkit.plan.plan import Batch, Decision, Memory, Plan, TrainPlan
from peftkit.units import divisors, show_bytes

TIGHT_SHARE = 0.08  # of the device's memory: below this margin a run may fail by fragmentation
_RECOMPUTE_FACTOR = {"none": 1.0, "selective": 1.17, "full": 1.33}  # of a step: a third of the work is done again
_SATURATING_TOKENS = 8192  # beyond so many tokens in a pass a device gains nothing more
# where plain states do not fit: in 8 bits, then paged to the host as well
_SMALLER_OPTIMIZERS = ("adamw_bnb_8bit", "paged_adamw_8bit")
_PASS_OVERHEAD_TOKENS = {"cuda": 512, "cpu": 32, "mps": 128}  # what starting a pass costs, in tokens of work


@dataclass(frozen=True)
class Fit:
    """The verdict for one device. `margin_bytes` is negative if memory is missing."""

    verdict: str  # "fits" | "tight" | "does not fit"
    needed_bytes: int
    free_bytes: int

    @property
    def margin_bytes(self) -> int:
        return self.free_bytes - self.needed_bytes


def check_fit(memory: Memory, device: DeviceFacts) -> Fit:
    """Compare the memory that a plan needs with what the device has free."""
    free = device.memory_bytes - device.used_bytes
    needed = memory.needed_bytes
    if device.kind != "cuda" and needed > free >= memory.peak.allocated_bytes + memory.context_bytes:
        return Fit("tight", needed, free)  # what glibc may keep of freed memory is an upper bound
    if needed > free:
        return Fit("does not fit", needed, free)
    return Fit("fits" if free - needed >= TIGHT_SHARE * device.memory_bytes else "tight", needed, free)


def longest_batch(plan: Plan, facts: Facts) -> Batch:
    """Return the largest micro-batch that will occur: the longest rows, or the fullest packs, together.

    Without counted lengths every row is assumed to have max_length tokens.
    """
    micro, lengths = plan.train.micro_batch, facts.data.lengths if facts.data else None
    if plan.train.packing:
        # the fullest packs together; where none are known, full ones
        packs = estimate_packs(lengths, plan.data.max_length)
        max_length = plan.data.max_length
        if packs is None:
            longest_packs = Batch(micro, max_length, 0, micro * (max_length - 1), is_padded=False, is_packed=True)
        else:
            rows = [packs.fullest[min(i, len(packs.fullest) - 1)] for i in range(min(micro, packs.num))]
            num_loss_tokens = sum(row.num_learnt for row in rows)
            longest_packs = Batch(len(rows), rows[0].num_tokens, 0, num_loss_tokens, is_padded=False, is_packed=True)
        return _add_eval_rows(longest_packs, plan, facts)
    if lengths is None:
        tokens = plan.data.max_length
        labels = tokens if plan.base.task == "seq2seq" else 0
        batch = Batch(micro, tokens, labels, micro * (tokens - 1), is_padded=micro > 1)
        return _add_eval_rows(batch, plan, facts)
    max_length, num_missing = plan.data.max_length, min(micro, lengths.num_rows) - len(lengths.longest)
    rows = [*lengths.longest[:micro], *[lengths.longest[-1]] * num_missing]
    tokens = min(rows[0].num_tokens, max_length)
    labels = min(max(row.num_labels for row in rows), max_length)
    num_loss_tokens = sum(min(row.num_learnt, max_length) for row in rows)
    is_uneven = len({min(row.num_tokens, max_length) for row in rows}) > 1 or lengths.source != "counted"
    return _add_eval_rows(Batch(len(rows), tokens, labels, num_loss_tokens, is_padded=is_uneven), plan, facts)


def _add_eval_rows(batch: Batch, plan: Plan, facts: Facts) -> Batch:
    """Add the held-out rows that are evaluated together, at the longest known length."""
    if not plan.data.eval or (facts.data is not None and facts.data.num_eval == 0):
        return batch
    rows, row, max_length = evaluation_rows(plan), None, plan.data.max_length
    if facts.data is not None:
        rows, row = min(rows, facts.data.num_eval), facts.data.longest_eval
    if row is None:
        return replace(batch, eval_rows=rows, eval_tokens=batch.num_tokens, eval_labels=batch.num_labels)
    tokens, labels = min(row.num_tokens, max_length), min(row.num_labels, max_length)
    return replace(batch, eval_rows=rows, eval_tokens=tokens, eval_labels=labels)


def micro_batches(batch_size: int) -> list[int]:
    """Return the divisors of the batch size, largest first: accumulation must be a whole number."""
    return divisors(batch_size)


def with_micro_batch(plan: Plan, size: int) -> Plan:
    """Return the plan with the same global batch in micro-batches of `size`."""
    train = replace(plan.train, micro_batch=size, accumulation=plan.train.batch_size // size)
    return replace(plan, train=train)


def replace_train(plan: Plan, train: TrainPlan, facts: Facts, reason: str) -> Plan:
    """Return the plan with other values of `train`; the decisions that changed give `reason`."""
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
    new_plan = replace(plan, train=train, decisions=decisions)
    return replace(new_plan, batch=longest_batch(new_plan, facts))


@dataclass(frozen=True)
class AutoValues:
    """The values that the recipe leaves to the plan."""

    micro_batch: bool
    checkpointing: bool
    optimizer: bool = False


def _variants(plan: Plan, free: AutoValues, *, can_recompute: bool) -> Iterator[Plan]:
    sizes = micro_batches(plan.train.batch_size // plan.ranks.num) if free.micro_batch else [plan.train.micro_batch]
    current_mode = plan.train.gradient_checkpointing
    modes = [*_RECOMPUTE_FACTOR] if free.checkpointing and can_recompute else [current_mode]
    optimizers = [plan.train.optimizer, *(_SMALLER_OPTIMIZERS if free.optimizer else ())]
    for optimizer, size, mode in product(optimizers, sizes, modes):
        variant = with_micro_batch(plan, size)
        yield replace(variant, train=replace(variant.train, gradient_checkpointing=mode, optimizer=optimizer))


def choose_auto_values(plan: Plan, facts: Facts, free: AutoValues, *, can_recompute: bool) -> tuple[Plan, str]:
    """Return (the fastest variant that fits with a margin, why); the smallest if none fits.

    `can_recompute` is True if the method allows activation checkpointing.
    """
    shape = facts.model.shape
    best: tuple[tuple[int, float], Plan] | None = None
    smallest: tuple[int, Plan] | None = None
    fixed_memories: dict[str, FixedMemory] = {}
    for variant in _variants(plan, free, can_recompute=can_recompute):
        has_small_states = variant.train.optimizer in _SMALLER_OPTIMIZERS
        rank = 1 + _SMALLER_OPTIMIZERS.index(variant.train.optimizer) if has_small_states else 0
        if best is not None and rank > best[0][0]:
            break  # smaller states are for where larger ones fit in no variant
        batch = longest_batch(variant, facts)
        too_large = batch.num_rows * batch.num_tokens > _SATURATING_TOKENS
        if free.micro_batch and too_large and variant.train.micro_batch > 1:
            continue
        name = variant.train.optimizer
        fixed_memories[name] = fixed_memories.get(name) or fixed_memory(shape, variant)
        memory = closed_form_memory(shape, variant, batch, fixed_part=fixed_memories[name])
        fit = check_fit(memory, facts.device)
        if smallest is None or fit.needed_bytes < smallest[0]:
            smallest = (fit.needed_bytes, variant)
        tokens = variant.train.micro_batch * mean_row_tokens(variant, facts)
        sampling, shares = best_sampling(variant, facts)
        start = _PASS_OVERHEAD_TOKENS.get(facts.device.kind, 64)
        relative_step_time = (  # per token
            _RECOMPUTE_FACTOR[variant.train.gradient_checkpointing]
            / (1 - shares.get(sampling, 0.0))
            * (1 + start / tokens)
        )
        cost = (rank, relative_step_time)
        if fit.verdict == "fits" and (best is None or cost < best[0]):
            best = (cost, variant)
    assert smallest is not None
    chosen_plan = best[1] if best is not None else smallest[1]
    chosen_fit = check_fit(closed_form_memory(shape, chosen_plan, longest_batch(chosen_plan, facts)), facts.device)
    room = f"{show_bytes(chosen_fit.needed_bytes)} of {show_bytes(chosen_fit.free_bytes)}"
    if best is None:
        return chosen_plan, f"the least memory that these values allow ({room})"
    return chosen_plan, f"the fastest that fits with a margin ({room})"
