"""Metrics over answers, classes and tags: pure functions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

Tags = Sequence[Sequence[str]]


def _check(answers: Sequence[object], references: Sequence[object]) -> None:
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    if not answers:
        raise ValueError("no answers to compare")


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that equal their reference, blanks at the ends aside."""
    _check(answers, references)
    hits = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return hits / len(answers)


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD compares them."""
    plain = "".join(" " if char in string.punctuation else char for char in text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(num_common: int, num_found: int, num_wanted: int) -> float:
    return 2 * num_common / (num_found + num_wanted) if num_common else 0.0


def token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the words that answer and reference share (SQuAD, Rajpurkar et al. 2016, section 6.1)."""
    _check(answers, references)
    total = 0.0
    for answer, reference in zip(answers, references, strict=True):
        found, wanted = Counter(_words(answer)), Counter(_words(reference))
        if not found and not wanted:
            total += 1.0
        total += _f1((found & wanted).total(), found.total(), wanted.total())
    return total / len(answers)


def accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of classes that are right."""
    _check(answers, references)
    return sum(a == r for a, r in zip(answers, references, strict=True)) / len(answers)


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean of the F1 of each class that occurs on either side: rare classes weigh as much as common ones."""
    _check(answers, references)
    found, wanted = Counter(answers), Counter(references)
    common = Counter(a for a, r in zip(answers, references, strict=True) if a == r)
    classes = found.keys() | wanted.keys()
    return sum(_f1(common[c], found[c], wanted[c]) for c in classes) / len(classes)


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first, last + 1) of the entities in BIO tags; tags without B- or I- are entities of one word.

    An I- that continues nothing begins an entity, as in CoNLL's own scorer; O is no entity.
    """
    found: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-") if tag[:2] in {"B-", "I-"} else ("B", "", tag)
        goes_on = prefix == "I" and name == kind
        if kind and not goes_on:
            found.add((kind, start, place))
        if not goes_on:
            kind, start = ("", place) if tag == "O" else (name, place)
    return found


def entity_f1(answers: Tags, references: Tags) -> float:
    """F1 of whole entities, kind and borders, over all rows (CoNLL-2003)."""
    _check(answers, references)
    pairs = [(spans(a), spans(r)) for a, r in zip(answers, references, strict=True)]
    common = sum(len(a & r) for a, r in pairs)
    num_found, num_wanted = sum(len(a) for a, _ in pairs), sum(len(r) for _, r in pairs)
    return 1.0 if not num_found and not num_wanted else _f1(common, num_found, num_wanted)
