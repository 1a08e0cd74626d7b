"""LoRA: W + (alpha / rank) * B A with A, B trained (Hu et al. 2021, equation 3)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from peftkit.archs import Family, ModelShape, Module, family_of
from peftkit.methods.base import (
    AlsoTrain,
    Method,
    Options,
    PeftSpec,
    PositiveFloat,
    PositiveInt,
    Targets,
    TokenRows,
    by_role,
)

# Our name -> PEFT's init_lora_weights.
INITS: dict[str, bool | str] = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "olora": "olora",
    "eva": "eva",
}
CHANGES_BASE = ("pissa", "olora")  # they subtract their start from the base weights


class LoraOptions(Options):
    """Low-rank adapters on linear layers."""

    name: Literal["lora"]
    rank: PositiveInt = Field(16, description="inner dimension of the adapter; more is more capacity")
    alpha: PositiveFloat | None = Field(None, description="scale numerator; 2 x rank unless given")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Targets = "auto"
    target_parameters: list[str] = Field([], description="names of parameters (fused experts) to adapt")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    dora: bool = Field(False, description="train magnitude and direction apart (Liu et al. 2024)")
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"] = "default"
    lr_ratio: PositiveFloat | None = Field(None, description="LoRA+: learning rate of B over that of A")
    also_train: list[AlsoTrain] = Field([], description="embeddings, head, norms, or {tokens: [...]}")

    @property
    def scale_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha


def count(options: LoraOptions, shape: ModelShape, modules: tuple[Module, ...]) -> dict[str, int]:
    """rank x (d_in + d_out) per module; DoRA adds d_out magnitudes; then what `also_train` adds."""
    magnitudes = 1 if options.dora else 0
    counts = by_role(modules, lambda m: options.rank * (m.d_in + m.d_out) + magnitudes * m.d_out)
    return {**counts, **_count_also(options, shape)}


def _count_also(options: LoraOptions, shape: ModelShape) -> dict[str, int]:
    dims, family = shape.dims, family_of(shape.model_type)
    assert family is not None
    norm = dims.hidden * (2 if family.norm_bias else 1)
    table = dims.vocab * dims.hidden
    whole = {item for item in options.also_train if isinstance(item, str)}
    tokens = {token for item in options.also_train if isinstance(item, TokenRows) for token in item.tokens}
    found = {}
    if tokens:
        found["tokens"] = len(tokens) * dims.hidden
    if "norms" in whole:
        heads = 2 * dims.head_dim if family.qk_norm else 0
        found["norms"] = dims.num_layers * (len(family.norms) * norm + heads) + norm
    if "embeddings" in whole or ("head" in whole and shape.tied_embeddings):
        found["embeddings"] = table  # tied to the head, it is trained once
    if "head" in whole and not shape.tied_embeddings:
        found["head"] = table + (dims.vocab if family.head_bias else 0)
    return found


def peft(options: LoraOptions, shape: ModelShape | None, targets: tuple[str, ...] | str) -> PeftSpec:
    """peft.LoraConfig. Token rows are filled in once the tokenizer is there."""
    arguments: dict[str, Any] = {
        "r": options.rank,
        "lora_alpha": options.scale_alpha,
        "lora_dropout": options.dropout,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "init_lora_weights": INITS[options.init],
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }
    if options.target_parameters:
        arguments["target_parameters"] = list(options.target_parameters)
    family = family_of(shape.model_type) if shape else None
    whole = [item for item in options.also_train if isinstance(item, str)]
    if whole and family is not None:
        names = {
            "embeddings": (family.embeddings,),
            "head": (family.head,),
            "norms": (*family.norms, family.final_norm, *(("q_norm", "k_norm") if family.qk_norm else ())),
        }
        arguments["modules_to_save"] = [name for item in whole for name in names[item]]
        if shape and shape.tied_embeddings and {"embeddings", "head"} & set(whole):
            arguments["ensure_weight_tying"] = True
    return PeftSpec("LoraConfig", arguments)


def learning_rate(num_parameters: int) -> tuple[float, str]:
    if num_parameters < 1_000_000_000:
        return 5e-4, "below 1B parameters adapters want more (measured here on SmolLM2-135M)"
    if num_parameters <= 15_000_000_000:
        return 2e-4, "the QLoRA paper's value for 7B to 13B (Dettmers et al. 2023, table 9)"
    return 1e-4, "the QLoRA paper's value for 33B and 65B (Dettmers et al. 2023, table 9)"


def default_targets(family: Family | None) -> tuple[tuple[str, ...] | str, str]:
    reason = "all linear layers: modules matter more than rank (Dettmers et al. 2023; Schulman et al. 2025)"
    if family is None:
        return "all-linear", reason
    return family.targets, reason


METHOD = Method(
    name="lora",
    summary="low-rank adapters on linear layers",
    options=LoraOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_targets=default_targets,
)
