"""The examples of a recipe: rows in one shape, split into training and held-out ones, before tokenizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from peftkit.data.formats import CLASSES, Example, labels_of
from peftkit.data.rows.lazy import Subset
from peftkit.data.rows.scan_text import text_of
from peftkit.data.rows.tally import Tally

# what is known of each row: bytes asked and answered, hashes of all that it says and of what it asks
ROW_STATISTICS = ("asked", "answered", "hash", "input_hash")


def text_hash(text: str) -> int:
    """Return a 64-bit hash of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def row_statistics(example: Example) -> tuple[int, int, int, int]:
    """Compute the `ROW_STATISTICS` of one example. Case and blanks of the prompt do not count in its hash."""
    prompt = " ".join(example.key.lower().split())
    return (
        *prompt_and_answer_bytes(example),
        text_hash(f"{prompt}\0{text_of(example)}\0{example.answer}"),
        text_hash(prompt),
    )


class StoredExamples(Subset[Example]):
    """Examples on disk. `name` identifies their content; `columns` has the `ROW_STATISTICS` by name."""

    def __init__(
        self, items: Sequence[Example], numbers: Sequence[int], *, name: str, columns: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__(items, numbers)
        self.name, self.columns = name, columns


def row_statistic(examples: Sequence[Example], name: str) -> Sequence[int]:
    """Return one of the `ROW_STATISTICS` for each example, as stored or computed now."""
    if isinstance(examples, StoredExamples):
        return examples.columns[name]
    index = ROW_STATISTICS.index(name)
    return [row_statistics(example)[index] for example in examples]


@dataclass(frozen=True)
class Examples:
    """Training and held-out examples. Those of `ingest` are read from disk on access.

    `num_near_duplicates` counts rows that were to be held out and went back to training, because a training
    row nearly repeats them.
    """

    train: Sequence[Example]
    eval: Sequence[Example]
    format: str
    tally: Tally = field(default_factory=Tally)
    num_near_duplicates: int = 0
    weighted: bool = False  # rows or turns bring weights
    unused: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # by column: rows, what it looks like

    @property
    def key(self) -> str:
        """Return the content key of both sets; empty where some examples were built in memory."""
        names = [rows.name if isinstance(rows, StoredExamples) else "" for rows in (self.train, self.eval) if len(rows)]
        return " ".join(names) if all(names) else ""

    @cached_property
    def train_labels(self) -> tuple[str, ...]:
        """Return the classes of the training rows, sorted."""
        return labels_of(self.train) if self.format in CLASSES else ()

    @cached_property
    def eval_labels(self) -> tuple[str, ...]:
        """Return the classes of the held-out rows, sorted."""
        return labels_of(self.eval) if self.format in CLASSES else ()

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Return the classes of both sets, sorted."""
        return labels_of([*self.train, *self.eval]) if self.format in CLASSES else ()


_TEMPLATE_BYTES = 32  # what a chat template may add to a turn, in tokens


def prompt_and_answer_bytes(example: Example) -> tuple[int, int]:
    """Return (bytes of the prompt, bytes of the last answer) of an example, with what a template may add."""
    turns = [message["content"] for message in example.messages]
    prompts = [example.prompt, *example.words, *turns[:-1]]
    answer = turns[-1] if turns else example.completion
    extra = _TEMPLATE_BYTES * max(1, len(turns))
    return sum(map(_utf8_bytes, prompts)) + extra, _utf8_bytes(answer) + 1


def _utf8_bytes(text: str) -> int:
    """Return the length of a text as UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
