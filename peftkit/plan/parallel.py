"""The processes that a plan trains on: how many, what each holds, and how a step is shared out."""

from __future__ import annotations

from dataclasses import replace

from peftkit.errors import Problem, UserError
from peftkit.plan.decisions import DecisionLog
from peftkit.plan.facts import DeviceFacts, Facts
from peftkit.plan.plan import Plan, RanksPlan
from peftkit.units import divisors


def decide_ranks(d: DecisionLog, facts: Facts) -> RanksPlan:
    """Decide how many processes train, and how: each with the whole model and a share of every step (DDP)."""
    count = d.loaded.recipe.devices.count
    num = facts.num_ranks if count == "auto" else int(count)
    reason = f"{num} processes were launched" if facts.num_ranks > 1 else "one process, unless more are asked for"
    d.record("devices.count", count, num, reason)
    if facts.num_ranks > 1 and num != facts.num_ranks:
        got = f"{num} in a launch of {facts.num_ranks} processes"
        d.refuse("devices.count", got, f"auto, or {facts.num_ranks}", "leave it out under a launcher")
    if facts.num_devices is not None and num > facts.num_devices and facts.device.kind == "cuda":
        d.refuse("devices.count", f"{num} with {facts.num_devices} GPUs", f"at most {facts.num_devices}")
    restarts = d.record("devices.restarts", d.loaded.recipe.devices.restarts)
    if restarts and num == 1:
        got, fix = f"{restarts} with one process", "leave it out, or set devices.count"
        d.refuse("devices.restarts", got, "several processes, which are started anew", fix)
    if num == 1:
        return RanksPlan()
    if facts.device.kind == "mps":
        d.refuse("devices.count", f"{num} on {facts.device.name}", "1", "it is one device")
    d.decide("devices.strategy", "ddp", "each process holds the whole model and computes a share of every step")
    return RanksPlan(num, "ddp")


def batch_of_ranks(d: DecisionLog, batch_size: int, micro_batch: int, ranks: RanksPlan) -> int:
    """Return a batch size that is left to the plan as one that divides; record a problem with one that is given."""
    unit = micro_batch * ranks.num
    if d.loaded.recipe.train.batch_size == "auto":
        return max(unit, batch_size - batch_size % unit)
    if ranks.num > 1 and batch_size % unit:
        near = sorted({max(unit, batch_size - batch_size % unit), batch_size + -batch_size % unit})
        of_micro = f" with micro_batch {micro_batch}" if micro_batch > 1 else ""
        got = f"{batch_size} over {ranks.num} processes{of_micro}"
        fix = f"try {' or '.join(map(str, near))}"
        if micro_batch > 1 and batch_size % ranks.num == 0:
            smaller = next(size for size in divisors(batch_size // ranks.num) if size <= micro_batch)
            fix += f", or train.micro_batch: {smaller}"
        d.refuse("train.batch_size", got, f"a multiple of {unit}", fix)
    return batch_size


def shared_device(device: DeviceFacts, num_ranks: int) -> DeviceFacts:
    """Return what each of several processes has of a device: a share of a host's memory, or a GPU of its own."""
    if device.kind == "cuda" or num_ranks == 1:
        return device
    return replace(device, memory_bytes=device.memory_bytes // num_ranks, used_bytes=device.used_bytes // num_ranks)


def plan_for_ranks(plan: Plan, num: int) -> Plan:
    """Return the plan for another number of processes: the same rows in each step. Raises UserError if none divide."""
    num_passes = plan.train.accumulation
    if num_passes % num:
        fits = ", ".join(str(divisor) for divisor in sorted(divisors(num_passes)))
        step = f"a step has {num_passes} micro-batches of {plan.train.micro_batch}"
        raise UserError(Problem("devices.count", f"{num} processes, and {step}", f"one of {fits}", "resume on so many"))
    return replace(plan, ranks=RanksPlan(num, "ddp") if num > 1 else RanksPlan())
