"""Metrics of answers, classes and tags: pure functions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

Tags = Sequence[Sequence[str]]


def _check_lengths(answers: Sequence[object], references: Sequence[object]) -> None:
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    if not answers:
        raise ValueError("no answers to compare")


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of answers equal to their reference, ignoring leading and trailing whitespace."""
    _check_lengths(answers, references)
    hits = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return hits / len(answers)


def _words(text: str) -> list[str]:
    """Return the lower-case words of a text without punctuation and articles, as SQuAD compares them."""
    plain = "".join(" " if char in string.punctuation else char for char in text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(num_common: int, num_predicted: int, num_expected: int) -> float:
    return 2 * num_common / (num_predicted + num_expected) if num_common else 0.0


def token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Compute the mean F1 of the words that answer and reference share.

    Source: SQuAD (Rajpurkar et al. 2016, section 6.1).
    """
    _check_lengths(answers, references)
    total = 0.0
    for answer, reference in zip(answers, references, strict=True):
        answer_words, reference_words = Counter(_words(answer)), Counter(_words(reference))
        if not answer_words and not reference_words:
            total += 1.0
        total += _f1((answer_words & reference_words).total(), answer_words.total(), reference_words.total())
    return total / len(answers)


def accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of correct classes."""
    _check_lengths(answers, references)
    return sum(a == r for a, r in zip(answers, references, strict=True)) / len(answers)


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Compute the unweighted mean of the F1 of each class that occurs in answers or references.

    Rare classes weigh as much as common ones.
    """
    _check_lengths(answers, references)
    predicted, expected = Counter(answers), Counter(references)
    common = Counter(a for a, r in zip(answers, references, strict=True) if a == r)
    classes = predicted.keys() | expected.keys()
    return sum(_f1(common[c], predicted[c], expected[c]) for c in classes) / len(classes)


def multi_label_f1(answers: Tags, references: Tags) -> tuple[float, float]:
    """Compute (micro, macro) F1 of texts with any number of classes.

    Micro counts all decisions alike; macro is the unweighted mean of each class that occurs.
    """
    _check_lengths(answers, references)
    common = Counter(name for a, r in zip(answers, references, strict=True) for name in set(a) & set(r))
    predicted, expected = (Counter(name for row in rows for name in row) for rows in (answers, references))
    classes = predicted.keys() | expected.keys()
    if not classes:
        return 1.0, 1.0
    macro = sum(_f1(common[c], predicted[c], expected[c]) for c in classes) / len(classes)
    return _f1(common.total(), predicted.total(), expected.total()), macro


def entity_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities in BIO tags as (kind, first, last + 1).

    Tags without B- or I- are entities of one word. An I- that continues nothing begins an entity, as in
    CoNLL's scorer; O is no entity.
    entity_spans(["B-PER", "I-PER", "O", "I-LOC"]) == {("PER", 0, 2), ("LOC", 3, 4)}
    """
    entities: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, entity_kind = tag.partition("-") if tag[:2] in {"B-", "I-"} else ("B", "", tag)
        continues = prefix == "I" and entity_kind == kind
        if kind and not continues:
            entities.add((kind, start, position))
        if not continues:
            kind, start = ("", position) if tag == "O" else (entity_kind, position)
    return entities


def entity_f1(answers: Tags, references: Tags) -> float:
    """Compute the F1 of whole entities, kind and borders both right, over all rows (CoNLL-2003)."""
    _check_lengths(answers, references)
    pairs = [(entity_spans(a), entity_spans(r)) for a, r in zip(answers, references, strict=True)]
    common = sum(len(a & r) for a, r in pairs)
    num_predicted, num_expected = sum(len(a) for a, _ in pairs), sum(len(r) for _, r in pairs)
    return 1.0 if not num_predicted and not num_expected else _f1(common, num_predicted, num_expected)
