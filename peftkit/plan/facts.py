"""What was found before anything is decided. Gathered by `run`; frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftkit.archs import ModelShape


@dataclass(frozen=True)
class DeviceFacts:
    """The device that trains. `memory_bytes` is the device's own memory, or the host's on CPU."""

    kind: Literal["cuda", "cpu", "mps"]
    name: str
    memory_bytes: int
    supports_bf16: bool  # in hardware: fast, not merely possible
    has_bitsandbytes: bool
    used_bytes: int = 0  # by others, now


@dataclass(frozen=True)
class ModelFacts:
    """The base: where it stands, and its shapes with the head of the task on top."""

    id: str
    kind: Literal["hub", "folder", "gguf", "embedded"]
    shape: ModelShape


@dataclass(frozen=True)
class Row:
    """The lengths of one row. `num_labels` is the target's length of an encoder-decoder, else 0."""

    num_tokens: int
    num_labels: int
    num_learnt: int


@dataclass(frozen=True)
class Packs:
    """Rows that lie together in `num` packs of at most `room` tokens. `fullest` are the fullest few."""

    room: int
    num: int
    fullest: tuple[Row, ...]


@dataclass(frozen=True)
class Lengths:
    """How long the rows are. `longest` are the longest few, longest first; `deciles` go from 0 to 100 %."""

    longest: tuple[Row, ...]
    deciles: tuple[int, ...]
    num_tokens: int  # of all rows
    num_learnt: int
    source: str  # "counted" | "at most": bytes of text where nothing was tokenized
    num_rows: int
    packs: Packs | None = None  # where the rows were laid together

    @property
    def mean(self) -> float:
        """Tokens of a row."""
        return self.num_tokens / self.num_rows

    def at(self, share: float) -> float:
        """The length that a share of the rows does not exceed, about."""
        place = share * (len(self.deciles) - 1)
        below = int(place)
        above = min(below + 1, len(self.deciles) - 1)
        return self.deciles[below] + (place - below) * (self.deciles[above] - self.deciles[below])


@dataclass(frozen=True)
class DataFacts:
    """Rows that are really trained on and held out."""

    num_train: int
    num_eval: int
    format: str
    labels: tuple[str, ...] = ()  # of classification, sorted
    lengths: Lengths | None = None
    longest_eval: Row | None = None
    weighted: bool = False  # rows or turns do not all weigh the same


@dataclass(frozen=True)
class TextFacts:
    """How the tokenizer turned examples into tokens. `ends` are the last tokens learnt, commonest first."""

    template: str  # whose; "none" without chats
    marked: bool  # by generation markers, else by rendering prefixes
    spans_reason: str
    pad: str
    pad_reason: str
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Everything that a plan rests on, beside the recipe."""

    device: DeviceFacts
    model: ModelFacts
    data: DataFacts | None
    text: TextFacts | None = None
