"""Truncation of rows beyond `max_length`: dropped, cut to their end, split, or refused. All are counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from peftkit.data.rows.tally import MAX_NAMED_ROWS
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.errors import Problem, UserError
from peftkit.plan.plan import DataPlan


@dataclass
class TruncationCounts:
    """Counts of what truncation did to rows.

    Of `num_learnt` tokens in the loss before, `num_learnt_lost` are no longer in it.
    """

    num_dropped: int = 0
    num_cut: int = 0
    num_split: int = 0
    num_learnt: int = 0
    num_learnt_lost: int = 0
    longest: int = 0
    shortest: int = 0
    num_rows: int = 0
    too_long: list[tuple[str, int]] = field(default_factory=list)

    def joined(self, other: TruncationCounts) -> TruncationCounts:
        """Add up two counts, such as those of training rows and of held-out rows."""
        own_values, other_values = asdict(self), asdict(other)
        totals = {name: value + other_values[name] for name, value in own_values.items() if name.startswith("num_")}
        shortest = min((length for length in (self.shortest, other.shortest) if length), default=0)
        too_long = (self.too_long + other.too_long)[:MAX_NAMED_ROWS]
        return TruncationCounts(
            **totals, longest=max(self.longest, other.longest), shortest=shortest, too_long=too_long
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TruncationCounts:
        """Restore counts from the values of `asdict`."""
        return cls(**{**value, "too_long": [(where, length) for where, length in value["too_long"]]})


def _split_row(row: Tokenized, max_length: int) -> Iterator[Tokenized]:
    """A row in pieces that fit, none of them one token; those that nothing is learnt from are left out.

    Nothing predicts the first token of a piece.
    """
    length = len(row.input_ids)
    cuts = [*range(0, length, max_length), length]
    if cuts[-1] - cuts[-2] == 1 and max_length > 2:
        cuts[-2] -= 1
    for start, stop in pairwise(cuts):
        piece = row.cut(start, stop)
        if piece.num_learnt > (piece.labels[0] != IGNORE_INDEX):
            yield piece


def truncate(row: Tokenized, plan: DataPlan, counts: TruncationCounts) -> list[Tokenized]:
    """Apply the truncation policy to a row, and count it in `counts`. Returns the rows that are left."""
    # the labels of several classes are a yes or no for each, no tokens
    length = len(row.input_ids) if plan.format == "multi-label" else row.length
    num_loss_tokens = row.num_learnt
    counts.num_rows += 1
    counts.num_learnt += num_loss_tokens
    counts.longest = max(counts.longest, length)
    counts.shortest = min(counts.shortest or length, length)
    if length <= plan.max_length:
        return [row]
    if len(counts.too_long) < MAX_NAMED_ROWS:
        counts.too_long.append((row.where, length))
    if plan.truncation == "split":
        counts.num_split += 1
        return [*_split_row(row, plan.max_length)]
    if plan.truncation == "keep_end":
        tail = row.cut(len(row.input_ids) - plan.max_length, len(row.input_ids))
        counts.num_cut += 1
        counts.num_learnt_lost += num_loss_tokens - tail.num_learnt
        return [tail]
    counts.num_dropped += 1
    counts.num_learnt_lost += num_loss_tokens
    return []


def refuse_long_rows(counts_of_sets: Sequence[TruncationCounts], plan: DataPlan) -> None:
    """Raise UserError for rows that are too long, where data.truncation is `error`."""
    if plan.truncation != "error":
        return
    fix = "raise train.max_length or set data.truncation: drop"
    problems = [
        Problem(where, f"{length} tokens", f"at most {plan.max_length}", fix)
        for counts in counts_of_sets
        for where, length in counts.too_long
    ]
    if problems:
        raise UserError(problems)
