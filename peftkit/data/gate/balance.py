"""Checks of the balance of classes, languages and lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peftkit.data.formats import CLASSES, Example
from peftkit.data.gate.finding import CheckInputs, DataFinding, finding_from_rows, show_share
from peftkit.data.gate.languages import language_of
from peftkit.data.rows.examples import row_statistic
from peftkit.data.rows.scan_text import text_of

_SAMPLE = 2_000
_MAX_CLASS_RATIO = 20  # the commonest class against the rarest
_MAX_MAJORITY = 0.9
_MAX_CLASSES = 200
_MAX_CLASS_WORDS = 5  # of an answer: longer ones are free text
_RARE_SHARE = 0.05  # of the rows: a language of so few is not meant
_MAX_LONGER_SHARE = 0.7
_LENGTH_FACTORS = (5, 20)  # than the 99th percentile, and than the median


def _evenly_spaced(rows: Sequence[Example]) -> list[Example]:
    """Return a sample of at most _SAMPLE rows, evenly spaced over all rows."""
    step = max(1, len(rows) // _SAMPLE)
    return [rows[i] for i in range(0, len(rows), step)][:_SAMPLE]


def labels(data: CheckInputs) -> DataFinding:
    """Find classes that are much rarer than others, or one class that is nearly everything."""
    examples = data.examples.train
    if data.examples.format in CLASSES:
        counts = Counter(label for e in examples for label in (e.tags or filter(None, [e.label])))
    else:
        answer_counts = Counter(e.answer.strip() for e in _evenly_spaced(examples))
        is_few = len(answer_counts) <= _MAX_CLASSES and sum(answer_counts.values()) >= 5 * len(answer_counts)
        is_few = is_few and all(len(answer.split()) <= _MAX_CLASS_WORDS for answer in answer_counts)
        counts = answer_counts if is_few else Counter()
    if len(counts) < 2:
        return DataFinding("labels", "n/a", "no classes to compare")
    (commonest, num_commonest), (rarest, num_rarest) = counts.most_common()[0], counts.most_common()[-1]
    total = len(examples) if data.examples.format == "multi-label" else sum(counts.values())
    kind = "classes" if data.examples.format in CLASSES else "short answers that recur"
    message = (
        f"{len(counts)} {kind}: {commonest!r} {show_share(num_commonest, total)}, {rarest!r} "
        f"{show_share(num_rarest, total)}"
    )
    is_tagging = data.examples.format == "token-classification"  # most words of a text are of no class
    if not is_tagging and (num_commonest >= _MAX_MAJORITY * total or num_commonest >= _MAX_CLASS_RATIO * num_rarest):
        rows = [
            (e.where, e.answer) for e in _evenly_spaced(data.examples.train) if rarest in (e.answer.strip(), *e.tags)
        ]
        fix = "add rows of the rare classes, and look at macro_f1 rather than accuracy"
        return finding_from_rows("labels", "warn", rows, message, fix)
    return DataFinding("labels", "pass", message)


def unseen_labels(data: CheckInputs) -> DataFinding:
    """Find classes that only one of the two sets has."""
    if data.examples.format not in CLASSES or not len(data.examples.eval):
        return DataFinding("unseen-labels", "n/a", "no classes to compare")
    train_classes, eval_classes = set(data.examples.train_labels), set(data.examples.eval_labels)
    missing_in_train = sorted(eval_classes - train_classes)
    missing_in_eval = sorted(train_classes - eval_classes)
    if missing_in_train:
        classes = set(missing_in_train)
        rows = [(e.where, e.label or "tags") for e in data.examples.eval if {e.label, *e.tags} & classes]
        message = f"held-out rows of classes that are not in the training data: {', '.join(missing_in_train[:8])}"
        return finding_from_rows(
            "unseen-labels", "warn", rows, message, "add rows of these classes to the training data"
        )
    if missing_in_eval:
        message = f"{len(missing_in_eval)} classes without a held-out row: {', '.join(missing_in_eval[:8])}"
        return DataFinding("unseen-labels", "warn", message, fix="hold out more rows, or choose them by class")
    return DataFinding("unseen-labels", "pass", "both sets have the same classes")


def languages(data: CheckInputs) -> DataFinding:
    """Find rows in another language than most, and held-out rows in another than the training data."""
    train = [(e.where, language_of(text_of(e))) for e in _evenly_spaced(data.examples.train)]
    eval_counts = Counter(language_of(text_of(e)) for e in _evenly_spaced(data.examples.eval))
    counts = Counter(name for _, name in train if name)
    if not counts:
        return DataFinding("languages", "n/a", "too little text to detect the language")
    total = sum(counts.values())
    summary = ", ".join(f"{name} {show_share(count, total)}" for name, count in counts.most_common(4))
    main_language = counts.most_common(1)[0][0]
    del eval_counts[""]
    if eval_counts and eval_counts.most_common(1)[0][0] != main_language:
        message = f"trained on {main_language}, evaluated on {eval_counts.most_common(1)[0][0]}"
        return DataFinding("languages", "warn", message, fix="hold out rows like those that are trained on")
    rare = {name for name, count in counts.items() if count < _RARE_SHARE * total}
    rows = [(where, name) for where, name in train if name in rare]
    if rows:
        return finding_from_rows(
            "languages", "warn", rows, f"a few rows are in another language: {summary}", "are they intended?"
        )
    return DataFinding("languages", "pass", summary)


def lengths(data: CheckInputs) -> DataFinding:
    """Find rows that are many times longer than all others."""
    rows = data.examples.train
    sizes = [a + b for a, b in zip(row_statistic(rows, "asked"), row_statistic(rows, "answered"), strict=True)]
    ordered = sorted(sizes)
    median, high = ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]
    if len(ordered) < 100:
        high = ordered[int(0.9 * (len(ordered) - 1))]
    limit = max(_LENGTH_FACTORS[0] * high, _LENGTH_FACTORS[1] * median)
    outliers = [(rows[i].where, f"{size:,} bytes") for i, size in enumerate(sizes) if size > limit]
    if not outliers:
        return DataFinding("lengths", "pass", f"the median row has {median:,} bytes, the longest {ordered[-1]:,}")
    message = (
        f"rows that are far longer than the others (median {median:,} bytes): {show_share(len(outliers), len(rows))}"
    )
    return finding_from_rows("lengths", "warn", outliers, message, "is it one row? A missing line break joins rows")


def preference_length(data: CheckInputs) -> DataFinding:
    """Warn if the chosen answers are mostly the longer, or mostly the shorter, ones."""
    if data.examples.format != "preference":
        return DataFinding("preference-length", "n/a", "no preferences")
    num_longer, total = data.examples.tally.of("chosen-longer").count, data.num_rows
    message = f"the chosen answer is the longer one in {show_share(num_longer, total)}"
    if num_longer > _MAX_LONGER_SHARE * total or num_longer < (1 - _MAX_LONGER_SHARE) * total:
        fix = "balance the lengths: otherwise the model learns to prefer length"
        return DataFinding("preference-length", "warn", message, fix=fix)
    return DataFinding("preference-length", "pass", message)


CHECKS = {
    "labels": labels,
    "unseen-labels": unseen_labels,
    "languages": languages,
    "lengths": lengths,
    "preference-length": preference_length,
}
