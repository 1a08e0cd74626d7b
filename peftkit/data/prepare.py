"""From rows to tokenized training and evaluation sets, with a ledger of every row."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.archs import Task
from peftkit.data.encode import ENCODERS, needs_template
from peftkit.data.formats import Example, detect, labels_of, rename, to_examples
from peftkit.data.mask import Tokenized, tokenize
from peftkit.data.read import Row, read_rows
from peftkit.data.template import ensure_template, render
from peftkit.errors import Problem, UserError
from peftkit.plan.plan import DataPlan
from peftkit.recipe.paths import is_data_path

_CHUNK = 512


@dataclass(frozen=True)
class Examples:
    """Rows brought to one shape and split, before any tokenizer is at hand."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    format: str

    @property
    def labels_never_learnt(self) -> tuple[str, ...]:
        """Classes that only held-out rows have."""
        learnt = set(labels_of(self.train))
        return tuple(label for label in labels_of(self.eval) if label not in learnt)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of both sets, sorted."""
        return labels_of((*self.train, *self.eval))


@dataclass(frozen=True)
class Prepared:
    """Tokenized sets and what became of the rows."""

    train: tuple[Tokenized, ...]
    eval: tuple[Tokenized, ...]
    eval_examples: tuple[Example, ...]
    num_dropped: int
    num_cut: int
    default_template: bool

    @property
    def num_tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.train)

    @property
    def num_learnt(self) -> int:
        return sum(row.num_learnt for row in self.train)


def split_share(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out). Examples with the same input stay on one side; at least one is held out of two."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.key, []).append(example)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    wanted = max(1, round(len(examples) * share)) if len(keys) > 1 and share > 0 else 0
    held: set[str] = set()
    count = 0
    for key in keys[:-1]:
        if count >= wanted:
            break
        held.add(key)
        count += len(groups[key])
    return ([e for e in examples if e.key not in held], [e for e in examples if e.key in held])


def read_examples(
    sources: Sequence[str],
    eval_source: str | float | None,
    *,
    wanted_format: str,
    columns: dict[str, str],
    seed: int,
    where: Callable[[tuple[str, ...]], str],
) -> Examples:
    """Read, detect the format, and split. Raises UserError with file and line for what does not fit."""

    def examples_of(rows: list[Row], name: str) -> list[Example]:
        return to_examples(rows, name)

    rows = rename(read_rows(sources, where=where(("data", "train"))), columns)
    name = detect(rows) if wanted_format == "auto" else wanted_format
    train = examples_of(rows, name)
    if isinstance(eval_source, str):
        is_file = is_data_path(eval_source)
        if not is_file and any(is_data_path(source) for source in sources):
            expected = "a file or a share: only hub datasets have splits"
            raise UserError(
                Problem(where(("data", "eval")), repr(eval_source), expected, "for example eval: 5%")
            )
        held_rows = read_rows(
            [eval_source] if is_file else sources,
            where=where(("data", "eval")),
            split="train" if is_file else eval_source,
        )
        return Examples(tuple(train), tuple(examples_of(rename(held_rows, columns), name)), name)
    kept, held = split_share(train, eval_source or 0.0, seed)
    return Examples(tuple(kept), tuple(held), name)


def _fit(rows: list[Tokenized], plan: DataPlan) -> tuple[list[Tokenized], int, int]:
    """(rows that fit, dropped, cut) under the truncation policy. Never silent: both counts are reported."""
    long = [row for row in rows if row.length > plan.max_length]
    if not long:
        return rows, 0, 0
    if plan.truncation == "error":
        raise UserError(
            [
                Problem(
                    row.where,
                    f"{row.length} tokens",
                    f"at most {plan.max_length}",
                    "raise train.max_length or set data.truncation: drop",
                )
                for row in long[:20]
            ]
        )
    if plan.truncation == "drop":
        return [row for row in rows if row.length <= plan.max_length], len(long), 0
    cut = [
        Tokenized(row.input_ids[-plan.max_length :], row.labels[-plan.max_length :], row.where)
        for row in rows
    ]
    return cut, 0, len(long)


def _tokenized(
    examples: Sequence[Example], tokenizer: Any, plan: DataPlan, task: Task, labels: Sequence[str]
) -> list[Tokenized]:
    rows: list[Tokenized] = []
    ids = {label: number for number, label in enumerate(labels)}
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        if task == "causal-lm":
            rows.extend(tokenize([render(e, tokenizer) for e in chunk], tokenizer, mask=plan.mask))
        else:
            rows.extend(ENCODERS[task](chunk, tokenizer, ids))
    return rows


def prepare(
    examples: Examples,
    tokenizer: Any,
    plan: DataPlan,
    *,
    task: Task = "causal-lm",
    labels: Sequence[str] = (),
) -> Prepared:
    """Render, tokenize, mask and fit. Raises UserError where no row is left to learn from."""
    chats = any(example.messages for example in (*examples.train[:1], *examples.eval[:1]))
    wanted = chats if task == "causal-lm" else needs_template((*examples.train, *examples.eval))
    default_template = wanted and ensure_template(tokenizer)
    raw = _tokenized(examples.train, tokenizer, plan, task, labels)
    train, dropped, cut = _fit(raw, plan)
    if not train:
        longest, shortest = max(r.length for r in raw), min(r.length for r in raw)
        raise UserError(
            Problem(
                "train.max_length",
                f"{plan.max_length}, and all {len(raw)} rows are longer",
                f"room for rows of {shortest} to {longest} tokens",
                f"set train.max_length: {longest}",
            )
        )
    silent = [row for row in train if row.num_learnt == 0]
    if silent:
        raise UserError(
            [
                Problem(
                    row.where,
                    "a row in which no token is learnt",
                    "an answer to learn",
                    "see data.mask and data.truncation",
                )
                for row in silent[:20]
            ]
        )
    held, held_dropped, held_cut = _fit(_tokenized(examples.eval, tokenizer, plan, task, labels), plan)
    if examples.eval and not held:
        got = f"held-out rows that are all longer than {plan.max_length} tokens"
        raise UserError(Problem("data.eval", got, "rows that fit", "raise train.max_length"))
    kept = {row.where for row in held}
    return Prepared(
        train=tuple(train),
        eval=tuple(held),
        eval_examples=tuple(example for example in examples.eval if example.where in kept),
        num_dropped=dropped + held_dropped,
        num_cut=cut + held_cut,
        default_template=default_template,
    )
