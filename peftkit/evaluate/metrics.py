"""Metrics over answers: pure functions."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that equal their reference, blanks at the ends aside."""
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    if not answers:
        raise ValueError("no answers to compare")
    hits = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return hits / len(answers)
