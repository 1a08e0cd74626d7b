"""Facts gathered before anything is decided: device, model, data, text. Frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftkit.archs import ModelShape


@dataclass(frozen=True)
class DeviceFacts:
    """The training device. `memory_bytes` is the device's own memory, or the host's on CPU."""

    kind: Literal["cuda", "cpu", "mps"]
    name: str
    memory_bytes: int
    supports_bf16: bool  # in hardware: fast, not merely possible
    has_bitsandbytes: bool
    used_bytes: int = 0  # by others, now


@dataclass(frozen=True)
class ModelFacts:
    """The base model: its location, and its shapes including the task's head."""

    id: str
    kind: Literal["hub", "folder", "gguf", "embedded"]
    shape: ModelShape


@dataclass(frozen=True)
class RowLengths:
    """The lengths of one row. `num_labels` is the target's length of an encoder-decoder, else 0."""

    num_tokens: int
    num_labels: int
    num_learnt: int


@dataclass(frozen=True)
class PackLengths:
    """`num` packs of rows, each of at most `room` tokens. `fullest` are the fullest few."""

    room: int
    num: int
    fullest: tuple[RowLengths, ...]


@dataclass(frozen=True)
class Lengths:
    """Lengths of the rows. `longest` are the longest few, longest first; `deciles` go from 0 to 100 %."""

    longest: tuple[RowLengths, ...]
    deciles: tuple[int, ...]
    num_tokens: int  # of all rows
    num_learnt: int
    source: str  # "counted" | "at most": bytes of text where nothing was tokenized
    num_rows: int
    packs: PackLengths | None = None  # where the rows were laid together

    @property
    def mean(self) -> float:
        """Mean tokens per row."""
        return self.num_tokens / self.num_rows

    def at(self, share: float) -> float:
        """Return the length at a quantile, interpolated between deciles."""
        position = share * (len(self.deciles) - 1)
        lower = int(position)
        upper = min(lower + 1, len(self.deciles) - 1)
        return self.deciles[lower] + (position - lower) * (self.deciles[upper] - self.deciles[lower])


@dataclass(frozen=True)
class DataFacts:
    """Numbers of the rows that are trained on and held out."""

    num_train: int
    num_eval: int
    format: str
    labels: tuple[str, ...] = ()  # of classification, sorted
    lengths: Lengths | None = None
    longest_eval: RowLengths | None = None
    weighted: bool = False  # rows or turns do not all weigh the same
    unused: tuple[str, ...] = ()  # columns and keys of turns that are not read


@dataclass(frozen=True)
class TextFacts:
    """The tokenizer's rendering of examples. `ends` are the last tokens in the loss, commonest first."""

    template: str  # whose; "none" without chats
    marked: bool  # by generation markers, else by rendering prefixes
    spans_reason: str
    pad: str
    pad_reason: str
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Everything that a plan depends on, beside the recipe."""

    device: DeviceFacts
    model: ModelFacts
    data: DataFacts | None
    text: TextFacts | None = None
    num_ranks: int = 1  # processes that a launcher started together
    num_devices: int | None = None  # GPUs of this machine; None where any number may be thought of
