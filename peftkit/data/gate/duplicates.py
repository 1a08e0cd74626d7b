"""Checks for repeated rows: duplicates, near duplicates, and held-out rows that are in the training data."""

from __future__ import annotations

import random
from collections.abc import Sequence

from peftkit.data.formats import Example
from peftkit.data.gate.finding import CheckInputs, DataFinding, Status, finding_from_rows, show_share
from peftkit.data.rows.examples import row_statistic
from peftkit.data.rows.lazy import MappedSequence, Subset

SIMILARITY_SAMPLE = 10_000  # rows that the search for near duplicates looks at, unless asked for all
_MAX_DUPLICATES = 0.3
_MAX_LEAKED, _MAX_NEARLY_LEAKED = 0.01, 0.05  # of the held-out rows
_LONG_INPUT = 100  # characters


def _inputs(examples: Sequence[Example]) -> MappedSequence[str]:
    return MappedSequence(examples, lambda example: example.key)


def _sample(examples: Sequence[Example], full: bool) -> tuple[Sequence[Example], Sequence[int], str]:
    """Return (examples to compare, their numbers, the scope in words): all, or SIMILARITY_SAMPLE of them."""
    if full or len(examples) <= SIMILARITY_SAMPLE:
        return examples, range(len(examples)), "all"
    numbers = sorted(random.Random(0).sample(range(len(examples)), SIMILARITY_SAMPLE))
    return Subset(examples, numbers), numbers, f"a sample of {SIMILARITY_SAMPLE:,}"


def duplicates(data: CheckInputs) -> DataFinding:
    """Find training rows that are exact duplicates, answer included."""
    rows = data.examples.train
    first_by_hash: dict[int, int] = {}
    repeats = []
    for number, digest in enumerate(row_statistic(rows, "hash")):
        if first_by_hash.setdefault(digest, number) != number:
            repeats.append((number, first_by_hash[digest]))
    if not repeats:
        return DataFinding("duplicates", "pass", "no duplicate rows")
    pairs = [(rows[i].where, f"the same as {rows[j].where}") for i, j in repeats[:20]]
    status: Status = "fail" if len(repeats) > _MAX_DUPLICATES * len(rows) else "warn"
    message = f"duplicate rows: {show_share(len(repeats), len(rows))}"
    return DataFinding("duplicates", status, message, len(repeats), tuple(pairs), "keep one of each")


def near_duplicates(data: CheckInputs) -> DataFinding:
    """Find training rows that nearly repeat another."""
    from peftkit.data.rows import similar

    rows, numbers, scope = _sample(data.examples.train, data.full)
    hashes = row_statistic(data.examples.train, "hash")
    row_hashes = [hashes[number] for number in numbers]
    neighbours = similar.find_near_duplicates(MappedSequence(rows, lambda example: f"{example.key}\n{example.answer}"))
    matches = [(i, j, similarity) for i, j, similarity in neighbours if row_hashes[i] != row_hashes[j]]
    pairs = [(rows[i].where, f"{similarity:.0%} like {rows[j].where}") for i, j, similarity in matches[:20]]
    if not matches:
        return DataFinding("near-duplicates", "pass", f"no near-duplicate rows ({scope} compared)")
    message = f"near-duplicate rows: {show_share(len(matches), len(rows))}, {scope} compared"
    status: Status = "fail" if len(matches) > _MAX_DUPLICATES * len(rows) else "warn"
    return DataFinding("near-duplicates", status, message, len(matches), tuple(pairs), "keep one of each")


def leakage(data: CheckInputs) -> DataFinding:
    """Find held-out rows whose input is in the training data, word for word."""
    train, eval_rows = data.examples.train, data.examples.eval
    if not len(eval_rows):
        return DataFinding("leakage", "n/a", "nothing is held out")
    train_numbers = {digest: number for number, digest in enumerate(row_statistic(train, "input_hash"))}
    leaks = [
        (eval_rows[number].where, f"the input of {train[train_numbers[digest]].where}")
        for number, digest in enumerate(row_statistic(eval_rows, "input_hash"))
        if digest in train_numbers
    ]
    if not leaks:
        return DataFinding("leakage", "pass", "no held-out input is in the training data")
    status: Status = "fail" if len(leaks) >= _MAX_LEAKED * len(eval_rows) else "warn"
    message = f"held-out rows whose input is in the training data: {show_share(len(leaks), len(eval_rows))}"
    return finding_from_rows("leakage", status, leaks, message, "remove them from one set: scores would be too good")


def near_leakage(data: CheckInputs) -> DataFinding:
    """Find held-out rows whose input is nearly in the training data."""
    from peftkit.data.rows import similar

    if not len(data.examples.eval):
        return DataFinding("near-leakage", "n/a", "nothing is held out")
    eval_rows, numbers, _ = _sample(data.examples.eval, data.full)
    train, _, scope = _sample(data.examples.train, data.full)
    train_hashes = set(row_statistic(data.examples.train, "input_hash"))
    eval_hashes = row_statistic(data.examples.eval, "input_hash")
    texts = _inputs(eval_rows)
    common = similar.common_shingles(texts)
    neighbours = similar.match_near_duplicates(texts, _inputs(train), common)
    pairs = [
        (eval_rows[i], train[other], similarity)
        for i, (other, similarity) in sorted(neighbours.items())
        if eval_hashes[numbers[i]] not in train_hashes
    ]
    leaks = [(e.where, f"{similarity:.0%} like the input of {other.where}") for e, other, similarity in pairs]
    # short inputs made from one mould are alike by nature; long ones with the same answer are the same row
    num_same_rows = sum(len(e.key) >= _LONG_INPUT and e.answer == other.answer for e, other, _ in pairs)
    if not leaks:
        message = f"no held-out input is nearly in the training data ({scope} compared)"
        if data.examples.num_near_duplicates:
            message += f"; {data.examples.num_near_duplicates:,} rows were moved back to the training data for that"
        return DataFinding("near-leakage", "pass", message)
    status: Status = "fail" if num_same_rows >= _MAX_NEARLY_LEAKED * len(eval_rows) else "warn"
    message = (
        "held-out rows whose input is nearly in the training data: "
        f"{show_share(len(leaks), len(eval_rows))}, {scope} compared"
    )
    return finding_from_rows("near-leakage", status, leaks, message, "remove them from one of the two")


def held_out(data: CheckInputs) -> DataFinding:
    """Warn if no row is held out to measure on."""
    num_eval = len(data.examples.eval)
    if num_eval:
        return DataFinding("held-out", "pass", f"{num_eval:,} rows are held out")
    fix = "set data.eval: 5%, or a file: without it overfitting cannot be seen"
    return DataFinding("held-out", "warn", "no row is held out", fix=fix)


CHECKS = {
    "duplicates": duplicates,
    "near-duplicates": near_duplicates,
    "leakage": leakage,
    "near-leakage": near_leakage,
    "held-out": held_out,
}
