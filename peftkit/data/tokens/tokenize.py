"""Tokenize examples on all cores, in pieces that an interruption does not lose."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.archs import Task
from peftkit.data.chat.template import Rendered, Style, render
from peftkit.data.formats import Example
from peftkit.data.rows import cache
from peftkit.data.rows.examples import Examples
from peftkit.data.rows.lazy import Picked
from peftkit.data.tokens.encode import ENCODERS
from peftkit.data.tokens.mask import IGNORED, Tokenized, encode, tokenize
from peftkit.data.tokens.scan_tokens import Watch
from peftkit.data.tokens.truncate import Fitted, fit
from peftkit.plan.plan import DataPlan
from peftkit.rundir import write_json

_CHUNK = 512
PART_ROWS = 40_000  # examples to a file: what is done again at most after an interruption
_POSITION = "position.json"
_DECODED = 4  # rows of a chunk


@dataclass(frozen=True)
class Work:
    """All that tokens depend on beside the examples."""

    tokenizer: Any
    plan: DataPlan
    task: Task
    labels: tuple[str, ...]
    style: Style
    stops: frozenset[int]

    def key(self, examples: Examples) -> str:
        """The content hash under which tokens are kept."""
        return cache.key_of(
            rows=examples.key,
            tokenizer=tokenizer_sha256(self.tokenizer),
            plan={k: v for k, v in asdict(self.plan).items() if k in {"mask", "truncation", "max_length"}},
            work=[self.task, self.labels, asdict(self.style), sorted(self.stops)],
        )


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of all that a tokenizer does; one in Python is told by its class, vocabulary and settings."""
    known = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else repr((type(tokenizer), sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))
    )
    text = [known, repr(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
    return hashlib.sha256("\0".join(text).encode()).hexdigest()


def _chunks(examples: Sequence[Example]) -> Iterator[list[Example]]:
    for start in range(0, len(examples), _CHUNK):
        interrupt.stop_if_requested(
            "interrupted while tokenizing: run it again, it goes on from the last whole part"
        )
        yield list(examples[start : start + _CHUNK])


def _tokenized(examples: Sequence[Example], work: Work, watch: Watch) -> Iterator[list[Tokenized]]:
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
                yield _labelled(*waiting, work, watch)
            waiting = following
        if waiting is not None:
            yield _labelled(*waiting, work, watch)


def _labelled(rendered: Sequence[Rendered], encoding: Any, work: Work, watch: Watch) -> list[Tokenized]:
    """The rows of a chunk. Of the first few it is seen whether their tokens give back the text."""
    rows = tokenize(
        rendered, work.tokenizer, mask=work.plan.mask, stops=work.stops, encoded=encoding.result()
    )
    for row, made in zip(rows[:_DECODED], rendered, strict=False):
        watch.round_trip(row, made.text)
    return rows


class InMemory:
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


def _teaches(row: Tokenized, work: Work, watch: Watch) -> bool:
    """Whether something is learnt from a row; one from which nothing is, is noted and left out."""
    learnt = row.num_learnt
    if work.task == "causal-lm" and learnt and row.labels[0] != IGNORED:
        learnt -= 1  # nothing predicts the first token
        if not learnt:
            watch.tally.add("masked-rows", row.where, "a row of one token: there is nothing to predict")
    elif not learnt:
        watch.tally.add("masked-rows", row.where, "a row in which no token is learnt")
    return learnt > 0


def fill(
    examples: Sequence[Example], work: Work, writer: Any, watch: Watch, found: Fitted, *, start: int = 0
) -> None:
    """Tokenize examples, fit them, look at them, and write those from which something is learnt.

    `found` counts what becomes of them, `start` is the number of the first one.
    """
    for rows in _tokenized(examples, work, watch):
        kept: list[Tokenized] = []
        numbers: list[int] = []
        for number, row in enumerate(rows, start=start):
            watch.row(row, whole=work.task == "causal-lm" and work.plan.mask == "all")
            pieces = [piece for piece in fit(row, work.plan, found) if _teaches(piece, work, watch)]
            kept.extend(pieces)
            numbers.extend([number] * len(pieces))
        writer.write(kept, numbers)
        start += len(rows)
    writer.close()


def write(examples: Examples, work: Work, folder: Path) -> dict[str, Any]:
    """Fill a folder with tokenized sets, file by file, from where an earlier try stopped.

    Returns what is to be known of them. The position is written after each whole file.
    """
    from peftkit.data.tokens.store import Writer, content_sha256

    watch, files = Watch(work.tokenizer, work.task), []
    fitted = {"train": Fitted(), "eval": Fitted()}
    done = _position(folder)
    if done:
        watch.restore(done["watch"])
        fitted = {name: Fitted.from_json(value) for name, value in done["fitted"].items()}
        files = done["files"]
    for name, rows in (("train", examples.train), ("eval", examples.eval)):
        for start in range(0, max(1, len(rows)), PART_ROWS):
            file = f"{name}-{start // PART_ROWS:05}.arrow"
            if file in files:
                continue
            part = Picked(rows, range(start, min(len(rows), start + PART_ROWS)))
            with _frozen():
                fill(part, work, Writer(folder / file), watch, fitted[name], start=start)
            files.append(file)
            counts = {name: asdict(one) for name, one in fitted.items()}
            write_json(folder / _POSITION, {"files": files, "watch": watch.state(), "fitted": counts})
    (folder / _POSITION).unlink()
    return {
        "files": files,
        "seen": watch.to_json(),
        "fitted": [asdict(fitted["train"]), asdict(fitted["eval"])],
        "fingerprint": content_sha256([folder / file for file in files]),
    }


@contextmanager
def _frozen() -> Iterator[None]:
    """Spare the collector what the libraries hold: it would look through it again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _position(folder: Path) -> dict[str, Any] | None:
    """How far an earlier try came; None where there was none, or its files are not whole."""
    try:
        found: dict[str, Any] = json.loads((folder / _POSITION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if all((folder / file).is_file() for file in found["files"]) else None
