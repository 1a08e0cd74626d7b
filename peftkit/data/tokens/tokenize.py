"""Tokenization of examples on all cores, file by file, so that an interruption loses at most one file."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import interrupt
from peftkit.archs import Task
from peftkit.data.chat.template import Rendered, Style, render
from peftkit.data.formats import Example
from peftkit.data.rows import cache
from peftkit.data.rows.examples import Examples
from peftkit.data.rows.lazy import Subset
from peftkit.data.tokens.encode import ENCODERS
from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized, encode, tokenize
from peftkit.data.tokens.scan_tokens import TokenScanner
from peftkit.data.tokens.truncate import TruncationCounts, truncate
from peftkit.plan.plan import DataPlan
from peftkit.rundir import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_EXAMPLES = 512
FILE_EXAMPLES = 40_000  # examples to a file: what is done again at most after an interruption
_POSITION_FILE = "position.json"
_ROUND_TRIP_ROWS = 4  # rows of a chunk


@dataclass(frozen=True)
class TokenizeJob:
    """A tokenization job: all that tokens depend on beside the examples."""

    tokenizer: Any
    plan: DataPlan
    task: Task
    labels: tuple[str, ...]
    style: Style
    stops: frozenset[int]

    def key(self, examples: Examples) -> str:
        """Return the content hash under which tokens are cached."""
        return cache.content_key(
            rows=examples.key,
            tokenizer=tokenizer_sha256(self.tokenizer),
            plan={k: v for k, v in asdict(self.plan).items() if k in {"mask", "truncation", "max_length"}},
            work=[self.task, self.labels, asdict(self.style), sorted(self.stops)],
        )


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all that a tokenizer does; a slow one by its class, vocabulary and settings."""
    definition = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else repr((type(tokenizer), sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))
    )
    parts = [definition, repr(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _example_chunks(examples: Sequence[Example]) -> Iterator[list[Example]]:
    for start in range(0, len(examples), _CHUNK_EXAMPLES):
        interrupt.stop_if_requested(
            "interrupted while tokenizing: run it again to continue after the last finished file"
        )
        yield list(examples[start : start + _CHUNK_EXAMPLES])


def _tokenize_chunks(examples: Sequence[Example], job: TokenizeJob, scanner: TokenScanner) -> Iterator[list[Tokenized]]:
    """Tokenize examples in chunks: while one chunk is encoded on all cores, the next one is rendered."""
    if job.task != "causal-lm":
        ids = {label: number for number, label in enumerate(job.labels)}
        for chunk in _example_chunks(examples):
            for example in chunk:
                scanner.text(example)
            yield ENCODERS[job.task](chunk, job.tokenizer, ids)
        return
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for chunk in _example_chunks(examples):
            rendered = [render(e, job.tokenizer, job.style, mask=job.plan.mask) for e in chunk]
            for example, rendered_row in zip(chunk, rendered, strict=True):
                scanner.text(example)
                if rendered_row.missing:
                    missing_text = f"not in the rendered text: {rendered_row.missing}"
                    scanner.tally.add("template", rendered_row.where, missing_text)
                if rendered_row.missing_reasoning:
                    scanner.tally.add("reasoning", rendered_row.where, rendered_row.missing_reasoning)
            next_chunk = (rendered, pool.submit(encode, rendered, job.tokenizer))
            if pending is not None:
                yield _finish_chunk(*pending, job, scanner)
            pending = next_chunk
        if pending is not None:
            yield _finish_chunk(*pending, job, scanner)


def _finish_chunk(
    rendered: Sequence[Rendered], future: Any, job: TokenizeJob, scanner: TokenScanner
) -> list[Tokenized]:
    """Label the rows of an encoded chunk, and check that the tokens of the first few decode to the text."""
    rows = tokenize(rendered, job.tokenizer, mask=job.plan.mask, stops=job.stops, encoded=future.result())
    for row, rendered_row in zip(rows[:_ROUND_TRIP_ROWS], rendered, strict=False):
        scanner.check_round_trip(row, rendered_row.text)
    return rows


class MemoryWriter:
    """Writer that keeps rows in memory, for examples built by hand; same interface as `TokenWriter`."""

    def __init__(self) -> None:
        self.rows: list[Tokenized] = []
        self.examples: list[int] = []

    def write(self, rows: Sequence[Tokenized], examples: Sequence[int]) -> None:
        """Keep a batch of rows."""
        self.rows.extend(rows)
        self.examples.extend(examples)

    def close(self) -> None:
        """Do nothing: there is nothing to finish."""


def _has_loss_tokens(row: Tokenized, job: TokenizeJob, scanner: TokenScanner) -> bool:
    """Whether something is learnt from a row; one from which nothing is, is noted and left out."""
    num_loss_tokens = row.num_learnt
    if job.task == "causal-lm" and num_loss_tokens and row.labels[0] != IGNORE_INDEX:
        num_loss_tokens -= 1  # nothing predicts the first token
        if not num_loss_tokens:
            scanner.tally.add("masked-rows", row.where, "a row of one token: there is nothing to predict")
    elif not num_loss_tokens:
        scanner.tally.add("masked-rows", row.where, "a row without a token in the loss")
    return num_loss_tokens > 0


def write_rows(
    examples: Sequence[Example],
    job: TokenizeJob,
    writer: Any,
    scanner: TokenScanner,
    counts: TruncationCounts,
    *,
    start: int = 0,
) -> None:
    """Tokenize, scan and truncate examples, and write the rows that have tokens in the loss.

    `counts` counts what truncation does to them, `start` is the number of the first example.
    """
    for rows in _tokenize_chunks(examples, job, scanner):
        output_rows: list[Tokenized] = []
        numbers: list[int] = []
        for number, row in enumerate(rows, start=start):
            scanner.row(row, all_trained=job.task == "causal-lm" and job.plan.mask == "all")
            pieces = [piece for piece in truncate(row, job.plan, counts) if _has_loss_tokens(piece, job, scanner)]
            output_rows.extend(pieces)
            numbers.extend([number] * len(pieces))
        writer.write(output_rows, numbers)
        start += len(rows)
    writer.close()


def write_token_files(examples: Examples, job: TokenizeJob, folder: Path) -> dict[str, Any]:
    """Write tokenized sets to a folder, file by file, continuing where an earlier try stopped.

    Returns the entry's meta values. The position is written after each whole file.
    """
    from peftkit.data.tokens.store import TokenWriter, content_sha256

    scanner, files = TokenScanner(job.tokenizer, job.task), []
    truncation = {"train": TruncationCounts(), "eval": TruncationCounts()}
    position = _position(folder)
    if position:
        scanner.restore(position["watch"])
        truncation = {name: TruncationCounts.from_json(value) for name, value in position["fitted"].items()}
        files = position["files"]
    for name, rows in (("train", examples.train), ("eval", examples.eval)):
        for start in range(0, max(1, len(rows)), FILE_EXAMPLES):
            file = f"{name}-{start // FILE_EXAMPLES:05}.arrow"
            if file in files:
                continue
            part = Subset(rows, range(start, min(len(rows), start + FILE_EXAMPLES)))
            with _frozen():
                write_rows(part, job, TokenWriter(folder / file), scanner, truncation[name], start=start)
            files.append(file)
            counts = {name: asdict(set_counts) for name, set_counts in truncation.items()}
            write_json(folder / _POSITION_FILE, {"files": files, "watch": scanner.state(), "fitted": counts})
    (folder / _POSITION_FILE).unlink()
    return {
        "files": files,
        "seen": scanner.to_json(),
        "fitted": [asdict(truncation["train"]), asdict(truncation["eval"])],
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
        position: dict[str, Any] = json.loads((folder / _POSITION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return position if all((folder / file).is_file() for file in position["files"]) else None
