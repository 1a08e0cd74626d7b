"""The rows of a recipe, brought to one shape and split, before any tokenizer is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from peftkit.data.formats import CLASSES, Example, labels_of
from peftkit.data.gate.tally import Tally
from peftkit.data.lengths import Sizes, sizes_of


@dataclass(frozen=True)
class Examples:
    """Two sequences of examples. Those of `ingest` are read from disk as they are asked for.

    `key` names their content; empty for examples made by hand. `num_near` counts rows that were to be held
    out and went back to training, because a row there nearly repeats them.
    """

    train: Sequence[Example]
    eval: Sequence[Example]
    format: str
    tally: Tally = field(default_factory=Tally)
    key: str = ""
    num_near: int = 0
    sizes: tuple[Sizes, Sizes] | None = None  # of train and eval, where they were counted in reading

    @cached_property
    def train_sizes(self) -> Sizes:
        """(bytes asked, bytes answered) of each row to train on."""
        return self.sizes[0] if self.sizes else [sizes_of(example) for example in self.train]

    @cached_property
    def eval_sizes(self) -> Sizes:
        """(bytes asked, bytes answered) of each held-out row."""
        return self.sizes[1] if self.sizes else [sizes_of(example) for example in self.eval]

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
