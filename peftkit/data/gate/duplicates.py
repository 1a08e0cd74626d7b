"""Rows that say the same: duplicates, and held-out rows that stand in the training data as well."""

from __future__ import annotations

import random
from collections.abc import Sequence

from peftkit.data.formats import Example
from peftkit.data.gate.finding import Data, Finding, Status, of_pairs, share
from peftkit.data.rows.examples import column
from peftkit.data.rows.lazy import Mapped, Picked

SAMPLE = 10_000  # rows that the search for near duplicates looks at, unless asked for all
_MANY_DUPLICATES = 0.3
_LEAKED, _NEARLY_LEAKED = 0.01, 0.05  # of the held-out rows
_LONG = 100  # characters


def _asked(examples: Sequence[Example]) -> Mapped[str]:
    return Mapped(examples, lambda example: example.key)


def _whole(examples: Sequence[Example]) -> Mapped[str]:
    return Mapped(examples, lambda example: f"{example.key}\n{example.answer}")


def _sample(examples: Sequence[Example], full: bool) -> tuple[Sequence[Example], Sequence[int], str]:
    """(examples to look at, their numbers, how many in words)."""
    if full or len(examples) <= SAMPLE:
        return examples, range(len(examples)), "all"
    numbers = sorted(random.Random(0).sample(range(len(examples)), SAMPLE))
    return Picked(examples, numbers), numbers, f"a sample of {SAMPLE:,}"


def duplicates(data: Data) -> Finding:
    """Rows of the training data that say exactly the same, answer included."""
    rows = data.examples.train
    first: dict[int, int] = {}
    again = []
    for number, content in enumerate(column(rows, "hash")):
        if first.setdefault(content, number) != number:
            again.append((number, first[content]))
    if not again:
        return Finding("duplicates", "pass", "no row comes twice")
    shown = [(rows[i].where, f"the same as {rows[j].where}") for i, j in again[:20]]
    status: Status = "fail" if len(again) > _MANY_DUPLICATES * len(rows) else "warn"
    said = f"rows that repeat another: {share(len(again), len(rows))}"
    return Finding("duplicates", status, said, len(again), tuple(shown), "keep one of each")


def near_duplicates(data: Data) -> Finding:
    """Rows of the training data that nearly repeat another."""
    from peftkit.data.rows import similar

    rows, numbers, which = _sample(data.examples.train, data.full)
    known = column(data.examples.train, "hash")
    content = [known[number] for number in numbers]
    near = similar.near_duplicates(_whole(rows))
    found = [(i, j, same) for i, j, same in near if content[i] != content[j]]
    pairs = [(rows[i].where, f"{same:.0%} like {rows[j].where}") for i, j, same in found[:20]]
    if not found:
        return Finding("near-duplicates", "pass", f"no row nearly repeats another ({which} compared)")
    said = f"rows that nearly repeat another: {share(len(found), len(rows))}, {which} compared"
    status: Status = "fail" if len(found) > _MANY_DUPLICATES * len(rows) else "warn"
    return Finding("near-duplicates", status, said, len(found), tuple(pairs), "keep one of each")


def leakage(data: Data) -> Finding:
    """Held-out rows whose input stands in the training data, word for word."""
    train, held = data.examples.train, data.examples.eval
    if not len(held):
        return Finding("leakage", "pass", "nothing is held out")
    where = {asked: number for number, asked in enumerate(column(train, "input_hash"))}
    found = [
        (held[number].where, f"the input of {train[where[asked]].where}")
        for number, asked in enumerate(column(held, "input_hash"))
        if asked in where
    ]
    if not found:
        return Finding("leakage", "pass", "no held-out input is in the training data")
    status: Status = "fail" if len(found) >= _LEAKED * len(held) else "warn"
    said = f"held-out rows whose input is trained on: {share(len(found), len(held))}"
    return of_pairs("leakage", status, found, said, "take them out of one of the two: scores would flatter")


def near_leakage(data: Data) -> Finding:
    """Held-out rows whose input nearly stands in the training data."""
    from peftkit.data.rows import similar

    if not len(data.examples.eval):
        return Finding("near-leakage", "pass", "nothing is held out")
    held, numbers, _ = _sample(data.examples.eval, data.full)
    train, _, which = _sample(data.examples.train, data.full)
    asked = set(column(data.examples.train, "input_hash"))
    exact = column(data.examples.eval, "input_hash")
    texts = _asked(held)
    common = similar.common_runs(texts)
    near = similar.near_in(texts, _asked(train), common)
    pairs = [
        (held[i], train[other], same)
        for i, (other, same) in sorted(near.items())
        if exact[numbers[i]] not in asked
    ]
    found = [(e.where, f"{same:.0%} like the input of {other.where}") for e, other, same in pairs]
    # short inputs made from one mould are alike by nature; long ones with the same answer are the same row
    same_row = sum(len(e.key) >= _LONG and e.answer == other.answer for e, other, _ in pairs)
    if not found:
        said = f"no held-out input is nearly in the training data ({which} compared)"
        if data.examples.num_near:
            said += f"; {data.examples.num_near:,} rows went back to training for it"
        return Finding("near-leakage", "pass", said)
    status: Status = "fail" if same_row >= _NEARLY_LEAKED * len(held) else "warn"
    said = f"held-out rows whose input is nearly trained on: {share(len(found), len(held))}, {which} compared"
    return of_pairs("near-leakage", status, found, said, "take them out of one of the two")


def held_out(data: Data) -> Finding:
    """Whether there is anything to measure on."""
    num = len(data.examples.eval)
    if num:
        return Finding("held-out", "pass", f"{num:,} rows are held out")
    fix = "set data.eval: 5%, or a file: without it nothing tells learning from memorising"
    return Finding("held-out", "warn", "no row is held out", fix=fix)


CHECKS = {
    "duplicates": duplicates,
    "near-duplicates": near_duplicates,
    "leakage": leakage,
    "near-leakage": near_leakage,
    "held-out": held_out,
}
