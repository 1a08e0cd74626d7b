"""Rows longer than the model is to see: dropped, cut at the front, split, or refused. All are counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from peftkit.data.rows.tally import SHOWN
from peftkit.data.tokens.mask import IGNORED, Tokenized
from peftkit.errors import Problem, UserError
from peftkit.plan.plan import DataPlan


@dataclass
class Fitted:
    """What became of rows: of `num_learnt` tokens that were to be learnt, `num_learnt_lost` no longer are."""

    num_dropped: int = 0
    num_cut: int = 0
    num_split: int = 0
    num_learnt: int = 0
    num_learnt_lost: int = 0
    longest: int = 0
    shortest: int = 0
    num_rows: int = 0
    too_long: list[tuple[str, int]] = field(default_factory=list)

    def joined(self, other: Fitted) -> Fitted:
        """Both together: rows to train on, and rows held out."""
        mine, others = asdict(self), asdict(other)
        made = {name: value + others[name] for name, value in mine.items() if name.startswith("num_")}
        shortest = min((one for one in (self.shortest, other.shortest) if one), default=0)
        too_long = (self.too_long + other.too_long)[:SHOWN]
        return Fitted(**made, longest=max(self.longest, other.longest), shortest=shortest, too_long=too_long)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fitted:
        """What `asdict` gave."""
        return cls(**{**value, "too_long": [(where, length) for where, length in value["too_long"]]})


def _split(row: Tokenized, room: int) -> Iterator[Tokenized]:
    """A row in pieces that fit, none of them one token; those that nothing is learnt from are left out.

    Nothing predicts the first token of a piece.
    """
    length = len(row.input_ids)
    cuts = [*range(0, length, room), length]
    if cuts[-1] - cuts[-2] == 1 and room > 2:
        cuts[-2] -= 1
    for start, stop in pairwise(cuts):
        piece = row.cut(start, stop)
        if piece.num_learnt > (piece.labels[0] != IGNORED):
            yield piece


def fit(row: Tokenized, plan: DataPlan, found: Fitted) -> list[Tokenized]:
    """The row, or what the truncation policy makes of it; `found` counts it."""
    length, learnt = row.length, row.num_learnt
    found.num_rows += 1
    found.num_learnt += learnt
    found.longest = max(found.longest, length)
    found.shortest = min(found.shortest or length, length)
    if length <= plan.max_length:
        return [row]
    if len(found.too_long) < SHOWN:
        found.too_long.append((row.where, length))
    if plan.truncation == "split":
        found.num_split += 1
        return [*_split(row, plan.max_length)]
    if plan.truncation == "keep_end":
        cut = row.cut(len(row.input_ids) - plan.max_length, len(row.input_ids))
        found.num_cut += 1
        found.num_learnt_lost += learnt - cut.num_learnt
        return [cut]
    found.num_dropped += 1
    found.num_learnt_lost += learnt
    return []


def refuse_long(found: Sequence[Fitted], plan: DataPlan) -> None:
    """Raises UserError for rows that are too long, where the recipe asks for that."""
    if plan.truncation != "error":
        return
    fix = "raise train.max_length or set data.truncation: drop"
    problems = [
        Problem(where, f"{length} tokens", f"at most {plan.max_length}", fix)
        for one in found
        for where, length in one.too_long
    ]
    if problems:
        raise UserError(problems)
