"""From examples to tokenized training and evaluation sets on disk, with a ledger of every row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.archs import Task
from peftkit.data import cache
from peftkit.data.encode import ENCODERS, needs_template
from peftkit.data.examples import Examples
from peftkit.data.fit import Fitted, fit, refuse_long
from peftkit.data.formats import Example
from peftkit.data.gate.tally import Tally
from peftkit.data.gate.tokens import Watch
from peftkit.data.ingest import ingest, refuse_unusable
from peftkit.data.mask import IGNORED, Tokenized, encode, tokenize
from peftkit.data.spill import Picked
from peftkit.data.style import choose_style
from peftkit.data.template import NO_CHATS, Style, ensure_template, render
from peftkit.errors import Problem, UserError
from peftkit.plan.plan import DataPlan
from peftkit.recipe.schema import Data

__all__ = ["Examples", "Prepared", "prepare", "read_examples"]
_CHUNK = 512


@dataclass(frozen=True)
class Seen:
    """What the checks saw in tokens: `ends` are the last tokens learnt with their counts, commonest first."""

    tally: Tally
    ends: tuple[tuple[int, int], ...] = ()
    largest_id: int = 0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Seen:
        """What a `Watch` wrote."""
        ends = tuple((token, count) for token, count in value["ends"])
        return cls(Tally.from_json(value["tally"]), ends, value["largest_id"])


@dataclass(frozen=True)
class Prepared:
    """Tokenized sets and what became of the rows. `fingerprint` is of those on disk."""

    train: Sequence[Tokenized]
    eval: Sequence[Tokenized]
    eval_examples: Sequence[Example]
    num_dropped: int
    num_cut: int
    num_split: int
    style: Style
    seen: Seen
    fitted: Fitted = field(default_factory=Fitted)  # of the rows to train on
    fingerprint: str = ""

    @property
    def default_template(self) -> bool:
        """Whether chats are rendered with peftkit's own template, for want of another."""
        return self.style.source == "the default"

    @property
    def num_tokens(self) -> int:
        from peftkit.data.store import Counts

        return int(Counts.of(self.train).tokens.sum())

    @property
    def num_learnt(self) -> int:
        from peftkit.data.store import Counts

        return int(Counts.of(self.train).learnt.sum())


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
    data = Data(train=list(sources), eval=eval_source, format=wanted_format, columns=columns)  # type: ignore[arg-type]
    found = ingest(data, seed=seed, where=where)
    refuse_unusable(found, ())
    return found


@dataclass(frozen=True)
class _Work:
    """All that tokens depend on beside the examples."""

    tokenizer: Any
    plan: DataPlan
    task: Task
    labels: tuple[str, ...]
    style: Style
    stops: frozenset[int]

    def key(self, examples: Examples) -> str:
        """The content hash under which tokens are kept."""
        tokenizer = self.tokenizer
        text = [
            tokenizer.backend_tokenizer.to_str(),
            repr(tokenizer.special_tokens_map),
            str(tokenizer.chat_template),
        ]
        return cache.key_of(
            rows=examples.key,
            tokenizer=hashlib.sha256("\0".join(text).encode()).hexdigest(),
            plan={k: v for k, v in asdict(self.plan).items() if k in {"mask", "truncation", "max_length"}},
            work=[self.task, self.labels, asdict(self.style), sorted(self.stops)],
        )


def _chunks(examples: Sequence[Example]) -> Iterator[list[Example]]:
    for start in range(0, len(examples), _CHUNK):
        interrupt.stop_if_requested("interrupted while tokenizing; nothing was written")
        yield list(examples[start : start + _CHUNK])


def _tokenized(examples: Sequence[Example], work: _Work, watch: Watch) -> Iterator[list[Tokenized]]:
    """Rows in chunks. While one chunk is encoded on all cores, the next one is rendered."""
    if work.task != "causal-lm":
        ids = {label: number for number, label in enumerate(work.labels)}
        for chunk in _chunks(examples):
            for example in chunk:
                watch.text(example)
            yield ENCODERS[work.task](chunk, work.tokenizer, ids)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for chunk in _chunks(examples):
            rendered = [render(e, work.tokenizer, work.style, mask=work.plan.mask) for e in chunk]
            for example, made in zip(chunk, rendered, strict=True):
                watch.text(example)
                if made.lost:
                    watch.tally.add("template", made.where, f"not in the rendered text: {made.lost}")
                if made.lost_reasoning:
                    watch.tally.add("reasoning", made.where, made.lost_reasoning)
            following = (rendered, pool.submit(encode, rendered, work.tokenizer))
            if waiting is not None:
                yield _labelled(*waiting, work)
            waiting = following
        if waiting is not None:
            yield _labelled(*waiting, work)


def _labelled(rendered: Any, encoding: Any, work: _Work) -> list[Tokenized]:
    return tokenize(
        rendered, work.tokenizer, mask=work.plan.mask, stops=work.stops, encoded=encoding.result()
    )


class _InMemory:
    """Rows made by hand stay in memory; otherwise as a store's writer."""

    def __init__(self) -> None:
        self.rows: list[Tokenized] = []
        self.examples: list[int] = []

    def write(self, rows: Sequence[Tokenized], examples: Sequence[int]) -> None:
        """Keep a batch."""
        self.rows.extend(rows)
        self.examples.extend(examples)

    def close(self) -> None:
        """Nothing to finish."""


def _teaches(row: Tokenized, work: _Work, watch: Watch) -> bool:
    """Whether something is learnt from a row; one from which nothing is, is noted and left out."""
    learnt = row.num_learnt
    if work.task == "causal-lm" and learnt and row.labels[0] != IGNORED:
        learnt -= 1  # nothing predicts the first token
        if not learnt:
            watch.tally.add("masked-rows", row.where, "a row of one token: there is nothing to predict")
    elif not learnt:
        watch.tally.add("masked-rows", row.where, "a row in which no token is learnt")
    return learnt > 0


def _fill(examples: Sequence[Example], work: _Work, writer: Any, watch: Watch) -> Fitted:
    """Tokenize examples, fit them, look at them, and write those from which something is learnt."""
    found, start = Fitted(), 0
    for rows in _tokenized(examples, work, watch):
        kept: list[Tokenized] = []
        numbers: list[int] = []
        for number, row in enumerate(rows, start=start):
            watch.row(row)
            pieces = [piece for piece in fit(row, work.plan, found) if _teaches(piece, work, watch)]
            kept.extend(pieces)
            numbers.extend([number] * len(pieces))
        writer.write(kept, numbers)
        start += len(rows)
    writer.close()
    return found


def prepare(
    examples: Examples,
    tokenizer: Any,
    plan: DataPlan,
    *,
    task: Task = "causal-lm",
    labels: Sequence[str] = (),
    stops: frozenset[int] = frozenset(),
) -> Prepared:
    """Render, tokenize, mask and fit; kept on disk by content hash where the examples came from a recipe.

    `stops` are tokens at which generation stops. Raises UserError where no row is left to learn from.
    """
    style, source = NO_CHATS, ""
    if plan.chat_template is not None:
        tokenizer.chat_template = Path(plan.chat_template).read_text(encoding="utf-8")
        source = Path(plan.chat_template).name
    if task == "causal-lm":
        style = choose_style(examples.train or examples.eval, tokenizer, mask=plan.mask, source=source)
    elif needs_template(examples.train[:_CHUNK]) or needs_template(examples.eval[:_CHUNK]):
        default = ensure_template(tokenizer)
        style = Style("the default" if default else "the model's own", None, "the last answer is the target")
    work = _Work(tokenizer, plan, task, tuple(labels), style, stops)
    if not examples.key:
        train, held = _InMemory(), _InMemory()
        watch = Watch(tokenizer, task)
        fitted = [_fill(examples.train, work, train, watch), _fill(examples.eval, work, held, watch)]
        made = (tuple(train.rows), tuple(held.rows), held.examples)
        return _result(examples, work, made, fitted, Seen.from_json(watch.to_json()), "")
    key = work.key(examples)
    found = cache.find("tokens", key)
    if found is None:
        with cache.making("tokens", key) as folder:
            meta = _write(examples, work, folder)
            found = cache.publish(folder, "tokens", key, meta), meta
    from peftkit.data.store import TokenRows

    folder, meta = found
    rows = {name: TokenRows([folder / f"{name}.arrow"]) for name in ("train", "eval")}
    fitted = [Fitted(**value) for value in meta["fitted"]]
    sets = (rows["train"], rows["eval"], rows["eval"].examples.tolist())
    return _result(examples, work, sets, fitted, Seen.from_json(meta["seen"]), meta["fingerprint"])


def _write(examples: Examples, work: _Work, folder: Path) -> dict[str, Any]:
    """Fill a folder with tokenized sets. Returns what is to be known of them."""
    from peftkit.data.store import Writer, sha256_of

    watch = Watch(work.tokenizer, work.task)
    paths = [folder / "train.arrow", folder / "eval.arrow"]
    fitted = [
        _fill(rows, work, Writer(path), watch)
        for rows, path in zip((examples.train, examples.eval), paths, strict=True)
    ]
    return {
        "seen": watch.to_json(),
        "fitted": [asdict(one) for one in fitted],
        "fingerprint": sha256_of(paths),
    }


def _result(
    examples: Examples, work: _Work, sets: Any, fitted: list[Fitted], seen: Seen, fingerprint: str
) -> Prepared:
    """The prepared sets. Raises UserError where one that should have rows has none."""
    train, held, numbers = sets
    refuse_long(fitted, work.plan)
    if examples.train and not train:
        raise UserError(_nothing_left(fitted[0], seen.tally, work.plan))
    if examples.eval and not held:
        got = f"held-out rows that are all longer than {work.plan.max_length} tokens"
        if not fitted[1].num_dropped:
            got = "held-out rows in which no token is learnt"
        raise UserError(Problem("data.eval", got, "rows that fit", "raise train.max_length"))
    return Prepared(
        train=train,
        eval=held,
        eval_examples=Picked(examples.eval, numbers),
        num_dropped=sum(one.num_dropped for one in fitted),
        num_cut=sum(one.num_cut for one in fitted),
        num_split=sum(one.num_split for one in fitted),
        style=work.style,
        seen=seen,
        fitted=fitted[0],
        fingerprint=fingerprint,
    )


def _nothing_left(found: Fitted, tally: Tally, plan: DataPlan) -> list[Problem]:
    """Why no row is left to learn from."""
    masked = tally.of("masked-rows")
    if masked.count:
        fix = "see data.mask and data.truncation"
        return [Problem(where, what, "an answer to learn", fix) for where, what in masked.rows]
    return [
        Problem(
            "train.max_length",
            f"{plan.max_length}, and all {found.num_rows} rows are longer",
            f"room for rows of {found.shortest} to {found.longest} tokens",
            f"set train.max_length: {found.longest}",
        )
    ]
