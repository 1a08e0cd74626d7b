"""Less padding: examples packed into full rows, or batches grouped by length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from peftkit.methods import Method
from peftkit.plan.decisions import DecisionLog
from peftkit.plan.facts import Facts, Lengths, PackLengths, RowLengths
from peftkit.plan.plan import Plan
from peftkit.units import divisors

MAX_EPOCHS = 10  # beyond, rows are memorised rather than learned from
SHUFFLED, GROUPED = "shuffled", "grouped by length"
FORMER_SAMPLINGS = {"random": SHUFFLED, "by length": GROUPED}  # of runs begun before there was one order of a training
_PACK_FILL = 0.98  # of a pack's room, where the rows are not laid together yet: best-fit decreasing leaves less
_SORT_ABOVE = 0.05  # of a micro-batch: from here on rows of like length are taken together
_PACK_ABOVE = 0.10  # what padding must be left then, for a GPU to pack
WINDOW_STEPS = 50  # of which the rows are sorted by length
_MAX_PLACES = 1000  # so many places tell enough


@dataclass(frozen=True)
class TrainerRows:
    """The trainer's rows: examples, or packs of them. `num` is None if the data is unknown."""

    packing: bool
    num: int | None
    batch_size: int


def estimate_packs(lengths: Lengths | None, room: int) -> PackLengths | None:
    """Return the packs of rows of these lengths, counted or estimated; None if no length is known."""
    if lengths is None:
        return None
    if lengths.packs is not None and lengths.packs.room == room:
        return lengths.packs
    tokens = min(lengths.mean, room) * lengths.num_rows
    num = max(1, min(lengths.num_rows, round(tokens / room / _PACK_FILL)))
    fullest = room if num > 1 else min(room, round(tokens))
    num_loss_tokens = round(fullest * min(1.0, lengths.num_learnt / lengths.num_tokens))
    return PackLengths(room, num, (RowLengths(fullest, 0, num_loss_tokens),))


def num_epochs(plan: Plan, facts: Facts) -> float:
    """Return how often the run sees each row; 0 if that is unknown."""
    num_rows = num_trainer_rows(plan, facts)
    return num_drawn_rows(plan) / num_rows if num_rows else 0.0


def num_drawn_rows(plan: Plan) -> int:
    """Return how many of the trainer's rows the whole training draws: a full batch in each step, but for the last."""
    num_rows = (plan.train.num_steps or 0) * plan.train.batch_size
    num_asked = plan.train.num_rows or num_rows
    return num_asked if num_rows - plan.train.batch_size < num_asked <= num_rows else num_rows


def num_trainer_rows(plan: Plan, facts: Facts) -> int | None:
    """Return the number of the trainer's rows, examples or packs; None if it is unknown."""
    if facts.data is None:
        return None
    packs = estimate_packs(facts.data.lengths, plan.data.max_length) if plan.train.packing else None
    return packs.num if packs else facts.data.num_train


def mean_row_tokens(plan: Plan, facts: Facts) -> float:
    """Return the mean tokens of one of the trainer's rows."""
    max_length, lengths = plan.data.max_length, facts.data.lengths if facts.data else None
    if lengths is None:
        return max_length
    mean = min(lengths.mean, max_length)
    return mean * lengths.num_rows / (num_trainer_rows(plan, facts) or 1) if plan.train.packing else mean


def _packing_obstacle(d: DecisionLog, facts: Facts, method: Method) -> tuple[str, str]:
    """Return (what packing does not combine with, why); empty if it is possible."""
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
        return "weighted rows", "the trainer with weighted loss does not pack"
    if d.loaded.recipe.train.label_smoothing:
        return "train.label_smoothing", "the trainer with a smoothed loss does not pack"
    also = getattr(d.loaded.recipe.method, "also_train", [])
    if any(not isinstance(item, str) for item in also):
        return "also_train with tokens", "token rows are trained by another trainer, which does not pack"
    return "", ""


def choose_rows(
    d: DecisionLog, facts: Facts, method: Method, max_length: int, batch_size: int, *, num_ranks: int = 1
) -> TrainerRows:
    """Choose whether examples are packed, and then how many packs hold about `batch_size` of them.

    A given micro-batch is checked once tokens are counted.
    """
    train, data = d.loaded.recipe.train, facts.data
    unpacked_rows = TrainerRows(False, data.num_train if data else None, batch_size)
    obstacle, why = _packing_obstacle(d, facts, method)
    if train.packing is True and obstacle:
        d.refuse("train.packing", f"true with {obstacle}", "false or auto", why)
        return unpacked_rows
    if train.packing == "auto":
        best, reason = (
            (False, f"not with {obstacle}: {why}") if obstacle else _choose_packing(d, facts, max_length, batch_size)
        )
    else:
        best, reason = train.packing, ""
    if not d.record("train.packing", train.packing, best, reason):
        return unpacked_rows
    # how many packs hold about so many examples
    lengths = facts.data.lengths if facts.data else None
    packs = estimate_packs(lengths, max_length)
    if lengths is None or packs is None:
        num = facts.data.num_train if facts.data else None
        d.decide("train.packs_per_step", batch_size, "one example in each until the lengths are known")
        return TrainerRows(True, num, batch_size)
    packs_per_step = batch_size * packs.num / lengths.num_rows
    size, is_counted = num_ranks * max(1, round(packs_per_step / num_ranks)), lengths.source == "counted"
    description = f"{'about' if is_counted else 'at most'} {packs_per_step:.1f} packs of {max_length:,} tokens"
    d.decide("train.packs_per_step", size, f"{batch_size} examples are {description}")
    micro = d.loaded.recipe.train.micro_batch
    if is_counted and isinstance(micro, int) and size % (micro * num_ranks):
        nearest = next(divisor for divisor in divisors(size // num_ranks) if divisor <= micro)
        fix = f"try micro_batch: {nearest}, or another batch_size: {batch_size} examples are {description}"
        d.refuse("train.micro_batch", f"{micro} with {size} packs a step", f"a divisor of {size // num_ranks}", fix)
    return TrainerRows(True, packs.num, size)


def _choose_packing(d: DecisionLog, facts: Facts, max_length: int, batch_size: int) -> tuple[bool, str]:
    """Decide packing: auto.

    Not on a CPU, where it was measured slower; on a GPU, where it was not measured, only for much padding.
    """
    lengths = facts.data.lengths if facts.data else None
    if facts.device.kind == "cpu":
        return False, "on a CPU, grouping rows by length was measured faster (docs/packing.md)"
    if facts.device.kind != "cuda":
        return False, f"not measured on {facts.device.kind}"
    if lengths is None or d.loaded.recipe.train.micro_batch != "auto":
        return False, "the rows' lengths are not known" if lengths is None else "train.micro_batch is given"
    remaining_padding = padding_share(lengths, max_length, micro=batch_size, step=batch_size, sampling=GROUPED)
    message = f"{100 * remaining_padding:.0f} % of a batch would be padding even with rows grouped by length"
    return remaining_padding > _PACK_ABOVE, f"{message} (a rule of thumb: not measured on a GPU)"


@lru_cache(maxsize=256)  # many variants of a plan ask the same
def padding_share(lengths: Lengths, max_length: int, *, micro: int, step: int, sampling: str) -> float:
    """Estimate the share of padding in micro-batches of `micro` rows, `step` rows per optimizer step.

    No row exceeds `max_length`. Only shuffled, each micro-batch is as long as its longest row; grouped, rows
    are sorted in windows of WINDOW_STEPS steps.

    padding = 1 - mean length / E[max of micro lengths],  P(max <= x) = P(length <= x) ** micro

    Example: lengths uniform on 0..400 (mean 200), micro 4: E[max] = 400 * 4 / 5 = 320, padding 37.5 %
    shuffled; sorted by length within 50 steps of 16 rows, 0.4 %.
    """
    step = min(step, lengths.num_rows)
    window = step * max(1, min(WINDOW_STEPS, lengths.num_rows // step))
    num = window if sampling == GROUPED else _MAX_PLACES
    if num > _MAX_PLACES:  # the same picture in fewer places
        micro, num = max(1, round(micro * _MAX_PLACES / num)), _MAX_PLACES
    rows = sorted((min(max_length, lengths.at((place + 0.5) / num)) for place in range(num)), reverse=True)
    if sampling == GROUPED:
        pieces = [rows[start : start + micro] for start in range(0, num, micro)]
        padded_tokens = sum(piece[0] * len(piece) for piece in pieces)
    else:
        not_longer = [(1 - i / num) ** micro for i in range(num + 1)]  # in the micro-batch than the i-th
        padded_tokens = num * sum(row * (not_longer[i] - not_longer[i + 1]) for i, row in enumerate(rows))
    return max(0.0, 1 - sum(rows) / padded_tokens)


def best_sampling(plan: Plan, facts: Facts) -> tuple[str, Mapping[str, float]]:
    """Return (how the trainer draws rows, the share of padding for each way)."""
    lengths, train = facts.data.lengths if facts.data else None, plan.train
    if lengths is None or train.packing or train.micro_batch == 1:
        return SHUFFLED, {}
    max_length = plan.data.max_length
    shares = {
        sampling: padding_share(lengths, max_length, micro=train.micro_batch, step=train.batch_size, sampling=sampling)
        for sampling in (SHUFFLED, GROUPED)
    }
    return GROUPED if shares[SHUFFLED] > _SORT_ABOVE else SHUFFLED, shares


def choose_sampling(d: DecisionLog, plan: Plan, facts: Facts) -> Plan:
    """Return the plan with the sampling of rows, once the micro-batch is decided."""
    sampling, shares = best_sampling(plan, facts)
    if shares:
        shuffled, grouped = (f"{100 * shares[name]:.0f} %" for name in (SHUFFLED, GROUPED))
        reason = f"about {shuffled} of a micro-batch is padding if only shuffled, {grouped} if grouped"
    elif plan.train.packing:
        reason = "packs are all about the same length"
    else:
        is_single_row = plan.train.micro_batch == 1
        reason = "one row at a time has no padding" if is_single_row else "the rows' lengths are not known"
    d.decide("train.sampling", sampling, reason)
    return replace(plan, train=replace(plan.train, sampling=sampling))
