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


@dataclass(frozen=True)
class ModelFacts:
    """The base: where it stands, and its shapes with the head of the task on top."""

    id: str
    kind: Literal["hub", "folder", "gguf", "embedded"]
    shape: ModelShape


@dataclass(frozen=True)
class DataFacts:
    """Rows that are really trained on and held out."""

    num_train: int
    num_eval: int
    format: str
    labels: tuple[str, ...] = ()  # of classification, sorted


@dataclass(frozen=True)
class Facts:
    """Everything that a plan rests on, beside the recipe."""

    device: DeviceFacts
    model: ModelFacts
    data: DataFacts | None
