"""What every fine-tuning method says of itself. One file per method builds one `Method`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from peftkit.archs import Family, ModelShape, Module


class Options(BaseModel):
    """Base of all recipe sections: unknown keys are refused, types are strict, values are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TokenRows(Options):
    """Single rows of the embedding to train, by token text."""

    tokens: list[str] = Field(min_length=1, description="tokens of the vocabulary whose rows are trained")


AlsoTrain = Literal["embeddings", "head", "norms"] | TokenRows
Targets = Annotated[
    str | Annotated[list[str], Field(min_length=1)],
    Field(
        description="auto, attention, all-linear, a role (q, k, v, o, gate, up, down), a module name, "
        "or a list of roles and module names"
    ),
]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class PeftSpec:
    """A PEFT configuration by class name and arguments, so that light layers can carry it."""

    class_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One fine-tuning method.

    `options` is the recipe section; `count` predicts trainable parameters by role for the targeted
    modules of a shape; `peft` names the PEFT class and arguments (None: no adapter);
    `learning_rate` gives the default and its source for a model of so many parameters.
    """

    name: str
    summary: str
    options: type[Options]
    count: Callable[[Any, ModelShape, tuple[Module, ...]], dict[str, int]]
    peft: Callable[[Any, ModelShape | None, tuple[str, ...] | str], PeftSpec | None]
    learning_rate: Callable[[int], tuple[float, str]]
    default_targets: Callable[[Family | None], tuple[tuple[str, ...] | str, str]]
    quantized: bool = False
    trains_base: bool = False
    allows_checkpointing: bool = True


def by_role(modules: tuple[Module, ...], size: Callable[[Module], int]) -> dict[str, int]:
    """Sum `size` over modules, grouped by role, in the order in which roles first appear."""
    counts: dict[str, int] = {}
    for module in modules:
        counts[module.role] = counts.get(module.role, 0) + size(module)
    return counts


def no_targets(family: Family | None) -> tuple[tuple[str, ...] | str, str]:
    """For methods that wrap no modules."""
    return (), "this method adapts no single modules"
