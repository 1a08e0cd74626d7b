"""The interface of a fine-tuning method. Each method is one file that builds one `Method`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from peftkit.archs import ModelShape, Module, Tensor

Auto = Literal["auto"]


class Options(BaseModel):
    """Base of all recipe sections: unknown keys are refused, types are strict, values are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TokenRows(Options):
    """Single rows of the embedding to train, by token text."""

    tokens: list[str] = Field(min_length=1, description="tokens of the vocabulary whose rows are trained")


class NewTokens(Options):
    """Tokens to add to the vocabulary, with rows of the embeddings that are trained."""

    new_tokens: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, description="texts of new tokens")
    init: dict[str, str] = Field(
        {}, description="token: a text whose tokens' mean its row starts from; the mean of all rows where none is given"
    )


MATCH = "match:"
WHOLE_PARTS = ("embeddings", "head", "norms")  # of also_train


def _match_text(value: object) -> object:
    """Return items with {match: REGEX}, as YAML reads it with a blank, as the text match:REGEX."""
    if isinstance(value, list):
        return [_match_text(item) for item in value]
    is_match = isinstance(value, dict) and list(value) == ["match"] and isinstance(value["match"], str)
    return f"{MATCH}{value['match']}" if isinstance(value, dict) and is_match else value


_MATCH_SCHEMA: dict[str, Any] = {"type": "object", "properties": {"match": {"type": "string"}}, "required": ["match"]}
Item = Annotated[
    str,
    BeforeValidator(_match_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {**_MATCH_SCHEMA, "additionalProperties": False}]}),
]
AlsoTrain = TokenRows | NewTokens | Item
Targets = Annotated[
    Item | Annotated[list[Item], Field(min_length=1)],
    Field(
        description="auto, or modules: attention, all-linear, experts, a role (q, k, v, o, gate, up, down, ...), "
        "a name or its end, match:REGEX for whole names, or a list of these"
    ),
]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]  # what is counted here is never more
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0)]
Layers = Annotated[
    NonNegativeInt | str | list[NonNegativeInt | str] | None,
    Field(description="of the targets those in these layers: last 8, first 8, 0-15, a number, or a list of these"),
]
Excluded = Annotated[list[Item], Field(description="of the targets all but these, named as in targets")]


@runtime_checkable
class TargetOptions(Protocol):
    """Options of a method that adapts modules; each has them in its own place, which recipes of runs keep."""

    targets: str | list[str]
    layers: int | str | list[int | str] | None
    exclude: list[str]


@dataclass(frozen=True)
class PeftSpec:
    """A PEFT configuration by class name and arguments, so that modules without torch can hold it."""

    class_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """The modules to adapt, and the names by which PEFT reaches them.

    `names` are endings that match exactly the ordinary modules, `parameters` those of weights that PEFT
    reaches as parameters (fused experts). `ranks` and `alphas` are those of modules that differ from the rest,
    by name; `whole` is what is trained itself beside the adapter.
    """

    modules: tuple[Module, ...] = ()
    names: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    whole: tuple[Module | Tensor, ...] = ()


STEPS_EXPONENT = 0.17  # the best learning rate falls with the steps of a run to this power


@dataclass(frozen=True)
class RunSize:
    """The size of a run: its optimizer steps, None where unknown, and the rows of each."""

    num_steps: int | None
    batch_size: int

    def __str__(self) -> str:
        return f"{self.num_steps or 'some'} steps of {self.batch_size} rows"


def full_rate_by_law(shape: ModelShape, size: RunSize) -> float:
    """Return the learning rate of full fine-tuning by the model's width, the steps of the run, and its batches.

    rate = 5e-5 * (2000 / hidden)^0.781 * (200 / steps)^0.17 * sqrt(rows / 4), the last within 1/2 and 2

    The first is tinker-cookbook's (hyperparam_utils, its exponent of Llama), for which adapters want ten times as
    much (Schulman et al. 2025, "LoRA Without Regret"); the second was fitted elsewhere (docs/quality.md), the third is
    Malladi et al. 2022. Beside a new head, eight rows stand for four.
    """
    rows = size.batch_size / (8 if shape.task_head.modules else 4)
    of_batch = min(2.0, max(0.5, math.sqrt(rows)))
    of_steps = math.pow(200 / (size.num_steps or 200), STEPS_EXPONENT)
    return 5e-5 * math.pow(2000 / shape.dims.hidden, 0.781) * of_steps * of_batch


@dataclass(frozen=True)
class Conflict:
    """A conflict between an option of a method and a model. `key` is the option's name."""

    key: str
    got: str
    expected: str
    fix: str = ""


@dataclass(frozen=True)
class Method:
    """One fine-tuning method.

    `options` is the recipe section; `count` predicts trainable parameters by role for a selection; `peft`
    names the PEFT class and arguments (None: no adapter); `default_roles` gives the roles adapted for
    targets: auto, and why; `conflicts` yields options that a model cannot have; `refuses` returns the reason
    if the method cannot work on a model at all. `nearest` is the method to use instead.
    """

    name: str
    summary: str
    options: type[Options]
    count: Callable[[Any, ModelShape, Selection], dict[str, int]]
    peft: Callable[[Any, ModelShape, Selection], PeftSpec | None]
    learning_rate: Callable[[Any, ModelShape, RunSize], tuple[float, str]]
    default_roles: Callable[[ModelShape], tuple[tuple[str, ...], str]] | None = None
    conflicts: Callable[[Any, ModelShape, Selection], Iterator[Conflict]] = lambda *_: iter(())
    refuses: Callable[[ModelShape], str] = lambda shape: ""
    nearest: str = "lora"
    quantized: bool = False
    trains_base: bool = False
    reaches_parameters: bool = False  # fused experts
    allows_checkpointing: bool = True
    virtual_tokens: bool = False  # prepends learned tokens, keys or values
    mergeable: bool = True
    schedule: Callable[[int], dict[str, Any]] | None = None  # PEFT's arguments that follow from the steps
    min_steps: int = 1
    adds_penalty: bool = False  # PEFT adds one to the model's own loss


def sum_by_role(modules: tuple[Module, ...], size: Callable[[Module], int]) -> dict[str, int]:
    """Sum `size` over modules, grouped by role, in the order in which roles first appear."""
    counts: dict[str, int] = {}
    for module in modules:
        counts[module.role] = counts.get(module.role, 0) + size(module)
    return counts


def linear_roles(shape: ModelShape) -> tuple[tuple[str, ...], str]:
    """Return the usual default roles and why: every linear layer that can be adapted as a layer."""
    if any(module.by_parameter or module.in_experts for module in shape.modules):
        return ("attention",), "attention: the routed experts are many and fused (targets: [experts] adapts them)"
    reason = "all linear layers: modules matter more than rank (Dettmers et al. 2023; Schulman et al. 2025)"
    return ("all-linear",), reason


def count_head(shape: ModelShape) -> dict[str, int]:
    """Count the task's own head, which is initialised at random and trained whole beside any adapter."""
    head = sum(tensor.num_parameters for tensor in shape.tensors if tensor.role == "head")
    return {"head": head} if shape.task_head.modules else {}


def head_arguments(shape: ModelShape) -> dict[str, Any]:
    """Return PEFT's argument that trains and saves the task's head."""
    modules = shape.task_head.modules
    return {"modules_to_save": list(modules)} if modules else {}
