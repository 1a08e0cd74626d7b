"""The rows of a recipe, brought to one shape and split, before any tokenizer is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from peftkit.data.formats import CLASSES, Example, labels_of
from peftkit.data.rows.lazy import Picked
from peftkit.data.rows.scan_text import text_of
from peftkit.data.rows.tally import Tally

# what is known of each row: bytes asked and answered, hashes of all that it says and of what it asks
NUMBERS = ("asked", "answered", "hash", "input_hash")


def hash_of(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def numbers_of(example: Example) -> tuple[int, int, int, int]:
    """The values of `NUMBERS` for one example. Case and blanks do not count in what it asks."""
    asked = " ".join(example.key.lower().split())
    return (*sizes_of(example), hash_of(f"{asked}\0{text_of(example)}\0{example.answer}"), hash_of(asked))


class Kept(Picked[Example]):
    """Examples on disk. `name` stands for their content; `columns` has the `NUMBERS` of each by name."""

    def __init__(
        self,
        items: Sequence[Example],
        numbers: Sequence[int],
        *,
        name: str,
        columns: Mapping[str, Sequence[int]],
    ) -> None:
        super().__init__(items, numbers)
        self.name, self.columns = name, columns


def column(examples: Sequence[Example], name: str) -> Sequence[int]:
    """One of the `NUMBERS` of each example, counted in reading or now."""
    if isinstance(examples, Kept):
        return examples.columns[name]
    place = NUMBERS.index(name)
    return [numbers_of(example)[place] for example in examples]


@dataclass(frozen=True)
class Examples:
    """Two sequences of examples. Those of `ingest` are read from disk as they are asked for.

    `num_near` counts rows that were to be held out and went back to training, because a row there nearly
    repeats them.
    """

    train: Sequence[Example]
    eval: Sequence[Example]
    format: str
    tally: Tally = field(default_factory=Tally)
    num_near: int = 0
    weighted: bool = False  # rows or turns bring weights

    @property
    def key(self) -> str:
        """A name for the content of both; empty where some of it was made by hand."""
        names = [rows.name if isinstance(rows, Kept) else "" for rows in (self.train, self.eval) if len(rows)]
        return " ".join(names) if all(names) else ""

    @cached_property
    def train_labels(self) -> tuple[str, ...]:
        """The classes that are learnt, sorted."""
        return labels_of(self.train) if self.format in CLASSES else ()

    @cached_property
    def eval_labels(self) -> tuple[str, ...]:
        """The classes of held-out rows, sorted."""
        return labels_of(self.eval) if self.format in CLASSES else ()

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The classes of both sets, sorted."""
        return labels_of([*self.train, *self.eval]) if self.format in CLASSES else ()

    @property
    def labels_never_learnt(self) -> tuple[str, ...]:
        """Classes that only held-out rows have."""
        learnt = set(self.train_labels)
        return tuple(label for label in self.eval_labels if label not in learnt)


_TEMPLATE_BYTES = 32  # what a chat template may add to a turn, in tokens


def sizes_of(example: Example) -> tuple[int, int]:
    """(bytes that are asked, bytes that are answered last) of an example, with what a template may add."""
    turns = [m["content"] for m in example.messages]
    asked = [example.prompt, *example.words, *turns[:-1]]
    answered = turns[-1] if turns else example.completion
    extra = _TEMPLATE_BYTES * max(1, len(turns))
    return sum(map(_bytes, asked)) + extra, _bytes(answered) + 1


def _bytes(text: str) -> int:
    """How long a text is as UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
