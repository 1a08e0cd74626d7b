"""Whether classes, languages and lengths of the rows are as a user would want them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peftkit.data.formats import CLASSES, Example
from peftkit.data.gate.finding import Data, Finding, of_pairs, share
from peftkit.data.gate.languages import language_of
from peftkit.data.rows.examples import column
from peftkit.data.rows.scan_text import text_of

_SAMPLE = 2_000
_SKEW = 20  # the commonest class against the rarest
_MAJORITY = 0.9
_FEW_CLASSES = 200
_STRAY = 0.05  # of the rows: a language of so few is not meant
_MORE_OFTEN = 0.7
_LONGER = (5, 20)  # than the 99th percentile, and than the median


def _spread(rows: Sequence[Example]) -> list[Example]:
    """A sample, spread over all rows."""
    step = max(1, len(rows) // _SAMPLE)
    return [rows[i] for i in range(0, len(rows), step)][:_SAMPLE]


def _answers(data: Data) -> Counter[str]:
    """How often each class is learnt; of chats, each answer, where there are few different ones."""
    rows = data.examples.train
    if data.examples.format in CLASSES:
        return Counter(label for e in rows for label in (e.tags or (e.label,)))
    found = Counter(e.answer.strip() for e in _spread(rows))
    few = len(found) <= _FEW_CLASSES and sum(found.values()) >= 5 * len(found)
    return found if few else Counter()


def labels(data: Data) -> Finding:
    """Classes that are much rarer than others, or one that is nearly everything."""
    counts = _answers(data)
    if len(counts) < 2:
        return Finding("labels", "pass", "no classes to compare")
    (most, top), (rarest, low) = counts.most_common()[0], counts.most_common()[-1]
    whole = sum(counts.values())
    said = f"{len(counts)} classes: {most!r} {share(top, whole)}, {rarest!r} {share(low, whole)}"
    tags = data.examples.format == "token-classification"  # most words of a text are of no class
    if not tags and (top >= _MAJORITY * whole or top >= _SKEW * low):
        rows = [(e.where, e.answer) for e in _spread(data.examples.train) if e.answer.strip() == rarest]
        fix = "add rows of the rare classes, and look at macro_f1 rather than accuracy"
        return of_pairs("labels", "warn", rows, said, fix)
    return Finding("labels", "pass", said)


def unseen_labels(data: Data) -> Finding:
    """Classes of one set that the other lacks."""
    if data.examples.format not in CLASSES or not len(data.examples.eval):
        return Finding("unseen-labels", "pass", "no classes to compare")
    learnt, held = set(data.examples.train_labels), set(data.examples.eval_labels)
    never, unmeasured = sorted(held - learnt), sorted(learnt - held)
    if never:
        wrong = set(never)
        rows = [(e.where, e.label or "tags") for e in data.examples.eval if {e.label, *e.tags} & wrong]
        said = f"held-out rows of classes that are never learnt: {', '.join(never[:8])}"
        return of_pairs("unseen-labels", "warn", rows, said, "add rows of these classes to the training data")
    if unmeasured:
        said = f"{len(unmeasured)} classes that no held-out row measures: {', '.join(unmeasured[:8])}"
        return Finding("unseen-labels", "warn", said, fix="hold out more rows, or choose them by class")
    return Finding("unseen-labels", "pass", "both sets have the same classes")


def languages(data: Data) -> Finding:
    """Rows in another language than the others, and held-out rows in another than those trained on."""
    train = [(e.where, language_of(text_of(e))) for e in _spread(data.examples.train)]
    held = Counter(language_of(text_of(e)) for e in _spread(data.examples.eval))
    counts = Counter(name for _, name in train if name)
    if not counts:
        return Finding("languages", "pass", "too little text to tell the language")
    whole = sum(counts.values())
    told = ", ".join(f"{name} {share(count, whole)}" for name, count in counts.most_common(4))
    main = counts.most_common(1)[0][0]
    del held[""]
    if held and held.most_common(1)[0][0] != main:
        said = f"trained on {main}, measured on {held.most_common(1)[0][0]}"
        return Finding("languages", "warn", said, fix="hold out rows like those that are trained on")
    stray = {name for name, count in counts.items() if count < _STRAY * whole}
    rows = [(where, name) for where, name in train if name in stray]
    if rows:
        return of_pairs(
            "languages", "warn", rows, f"a few rows are in another language: {told}", "are they meant?"
        )
    return Finding("languages", "pass", told)


def lengths(data: Data) -> Finding:
    """Rows that are many times longer than all others."""
    rows = data.examples.train
    sizes = [a + b for a, b in zip(column(rows, "asked"), column(rows, "answered"), strict=True)]
    ordered = sorted(sizes)
    median, high = ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]
    if len(ordered) < 100:
        high = ordered[int(0.9 * (len(ordered) - 1))]
    limit = max(_LONGER[0] * high, _LONGER[1] * median)
    odd = [(rows[i].where, f"{size:,} bytes") for i, size in enumerate(sizes) if size > limit]
    if not odd:
        return Finding("lengths", "pass", f"the median row has {median:,} bytes, the longest {ordered[-1]:,}")
    said = f"rows that are far longer than the others (median {median:,} bytes): {share(len(odd), len(rows))}"
    return of_pairs("lengths", "warn", odd, said, "is it one row? A missing line break joins rows")


def preference_length(data: Data) -> Finding:
    """Whether the chosen answers are simply the longer ones."""
    if data.examples.format != "preference":
        return Finding("preference-length", "pass", "no preferences")
    longer, whole = data.examples.tally.of("chosen-longer").count, data.num_rows
    said = f"the chosen answer is the longer one in {share(longer, whole)}"
    if longer > _MORE_OFTEN * whole or longer < (1 - _MORE_OFTEN) * whole:
        fix = "balance the lengths: otherwise length is what is learnt"
        return Finding("preference-length", "warn", said, fix=fix)
    return Finding("preference-length", "pass", said)


CHECKS = {
    "labels": labels,
    "unseen-labels": unseen_labels,
    "languages": languages,
    "lengths": lengths,
    "preference-length": preference_length,
}
