"""LoRA: W + (alpha / rank) * B A with A, B trained (Hu et al. 2021, equation 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from peftkit.archs import ModelShape, Module, shortest_names
from peftkit.methods.base import (
    WHOLE_PARTS,
    AlsoTrain,
    Auto,
    Conflict,
    Excluded,
    Layers,
    Method,
    NewTokens,
    Options,
    PeftSpec,
    PositiveFloat,
    PositiveInt,
    RunSize,
    Selection,
    Targets,
    TokenRows,
    count_head,
    full_rate_by_law,
    head_arguments,
    linear_roles,
    sum_by_role,
)
from peftkit.methods.ln import norm_names

_USUAL_RANK, _USUAL_SCALE = 16, 2.0  # of which the law of the learning rate was measured
EVA_TOKENS_PER_RANK = 2  # PEFT decomposes batches of activations to twice the rank (Paischer et al. 2024)
# Our name -> PEFT's init_lora_weights.
INITS: dict[str, bool | str] = {
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "olora": "olora",
    "eva": "eva",
}
BASE_CHANGING_INITS = ("pissa", "olora")  # they subtract their start from the base weights
# tied tables that PEFT keeps tied when it is asked for the one end or the other
_TIED_BY_TABLE, _TIED_BY_HEAD = ("embed_tokens",), ("wte", "word_embeddings")


class LoraOptions(Options):
    """Low-rank adapters on linear layers."""

    name: Literal["lora"]
    rank: Auto | PositiveInt = Field("auto", description="inner dimension of the adapter; more is more capacity")
    alpha: PositiveFloat | None = Field(None, description="scale numerator; 2 x rank unless given")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Targets = "auto"
    layers: Layers = None
    exclude: Excluded = Field([])
    target_parameters: list[str] = Field([], description="names of parameters to adapt beside the targets")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    dora: bool = Field(False, description="train magnitude and direction apart (Liu et al. 2024)")
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"] = "default"
    lr_ratio: PositiveFloat | None = Field(None, description="LoRA+: learning rate of B over that of A")
    rank_pattern: dict[str, PositiveInt] = Field({}, description="other ranks, of modules named as in targets")
    alpha_pattern: dict[str, PositiveFloat] = Field({}, description="other alphas; 2 x their rank where neither says")
    also_train: list[AlsoTrain] = Field(
        [], description="embeddings, head, norms, {tokens: [...]}, {new_tokens: [...]}, or modules named as in targets"
    )

    @property
    def r(self) -> int:
        """The rank as a number, which a plan has settled."""
        assert isinstance(self.rank, int), "the plan settles the rank first"
        return self.rank

    @property
    def scale_alpha(self) -> float:
        return 2.0 * self.r if self.alpha is None else self.alpha


def count(options: LoraOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count rank * (d_in + d_out) per matrix, d_out magnitudes for DoRA, and the parts in `also_train`."""
    magnitudes = 1 if options.dora else 0

    def num_in(module: Module) -> int:
        rank = selection.ranks.get(module.name, options.r)
        return max(1, module.num) * rank * (module.d_in + module.d_out) + magnitudes * module.d_out

    counts = sum_by_role(selection.modules, num_in)
    for part in selection.whole:
        role = f"{part.role}, whole" if isinstance(part, Module) else part.role
        counts[role] = counts.get(role, 0) + part.num_parameters
    by_kind = shape.by_role()
    whole_parts = set(_whole_parts(options))
    tokens = {token for item in options.also_train if isinstance(item, TokenRows) for token in item.tokens}
    also_counts = {}
    added = set(new_tokens(options))
    if tokens | added:
        num_heads = 0 if shape.tied_embeddings else len(added)  # what is new has to be written, too
        also_counts["tokens"] = (len(tokens | added) + num_heads) * shape.dims.hidden
    if "norms" in whole_parts:
        also_counts["norms"] = by_kind.get("norms", 0)
    if "embeddings" in whole_parts or ("head" in whole_parts and shape.tied_embeddings):
        also_counts["embeddings"] = by_kind.get("embeddings", 0)  # tied to the head, it is trained once
    if "head" in whole_parts and not shape.tied_embeddings:
        also_counts["head"] = by_kind.get("head", 0)
    return {**counts, **also_counts, **count_head(shape)}


def new_tokens(options: LoraOptions) -> dict[str, str]:
    """Return the tokens that are added to the vocabulary, each with the text that it starts from, or an empty one."""
    items = [item for item in options.also_train if isinstance(item, NewTokens)]
    return {token: item.init.get(token, "") for item in items for token in item.new_tokens}


def _whole_parts(options: LoraOptions) -> list[str]:
    return [item for item in options.also_train if item in WHOLE_PARTS]


def _patterns(options: LoraOptions, selection: Selection) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield PEFT's rank_pattern and alpha_pattern, by endings that match exactly the modules that differ."""
    names = [module.name for module in selection.modules]
    ranks = {name: selection.ranks.get(name, options.r) for name in names}
    given = None if options.alpha is None else options.alpha
    alphas = {name: selection.alphas.get(name, given or 2.0 * ranks[name]) for name in names}
    for key, values, usual in (("rank_pattern", ranks, options.r), ("alpha_pattern", alphas, options.scale_alpha)):
        pattern = {
            ending: value
            for value in sorted({value for value in values.values() if value != usual})
            for ending in shortest_names([name for name in names if values[name] == value], names)
        }
        if pattern:
            yield key, pattern


def peft(options: LoraOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """Build peft.LoraConfig. Token rows are added once the tokenizer is loaded."""
    arguments: dict[str, Any] = {
        "r": options.r,
        "lora_alpha": options.scale_alpha,
        "lora_dropout": options.dropout,
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "init_lora_weights": INITS[options.init],
        "target_modules": list(selection.names),
        **head_arguments(shape),
    }
    if selection.parameters:
        arguments["target_parameters"] = list(selection.parameters)
    arguments |= _patterns(options, selection)
    if selection.whole:
        # PEFT takes endings here that need not begin at a dot: only whole names are exact
        whole_names = [part.name for part in selection.whole]
        arguments["modules_to_save"] = [*arguments.get("modules_to_save", ()), *whole_names]
    parts = _whole_parts(options)
    if parts:
        family = shape.family
        names = {"embeddings": [family.embeddings], "head": [family.head], "norms": norm_names(shape)}
        if shape.tied_embeddings:
            tied_end = "head" if family.embeddings in _TIED_BY_HEAD else "embeddings"
            names |= {"embeddings": names[tied_end], "head": names[tied_end]}
        modules_to_save = [*arguments.get("modules_to_save", ()), *(name for item in parts for name in names[item])]
        arguments["modules_to_save"] = list(dict.fromkeys(modules_to_save))
        if shape.tied_embeddings and {"embeddings", "head"} & set(parts):
            arguments["ensure_weight_tying"] = True
    return PeftSpec("LoraConfig", arguments)


def conflicts(options: LoraOptions, shape: ModelShape, selection: Selection) -> Iterator[Conflict]:
    """Yield options that PEFT cannot combine with parameter targets, a task head, or tied embeddings."""
    if selection.parameters:
        detail = f"with {selection.parameters[0]}, which PEFT reaches as a parameter"
        alternative = "or leave these modules out"
        if options.dropout:
            yield Conflict("dropout", f"{options.dropout} {detail}", "0", f"set dropout: 0, {alternative}")
        if options.dora:
            yield Conflict("dora", f"true {detail}", "false", f"set dora: false, {alternative}")
        if options.init not in {"default", "gaussian"}:
            yield Conflict("init", f"{options.init} {detail}", "default")
        for key, values in (("rank_pattern", selection.ranks), ("alpha_pattern", selection.alphas)):
            if names := [m.name for m in selection.modules if m.name in values and (m.in_experts or m.by_parameter)]:
                yield Conflict(key, f"{names[0]}, which PEFT reaches as a parameter", "layers of their own")
    if selection.ranks and options.init == "eva":
        yield Conflict(
            "rank_pattern", "ranks with init eva", "one rank", "leave rank_pattern out, or take another init"
        )
    smallest = min((module.d_in for module in selection.modules), default=0)
    if options.init == "eva" and EVA_TOKENS_PER_RANK * options.r > smallest > 0:
        got = f"eva at rank {options.r} for a layer with {smallest} inputs"
        yield Conflict("init", got, f"a rank of at most {smallest // EVA_TOKENS_PER_RANK}", "or another init")
    head = shape.task_head.modules
    if head and options.init in BASE_CHANGING_INITS:
        fix = f"PEFT converts only A and B of such an adapter: the {shape.task} head would be lost"
        yield Conflict("init", f"{options.init} with a head to train", "default", fix)
    if "head" in options.also_train and head:
        yield Conflict(
            "also_train", "head", "no head here", f"the {shape.task} head ({', '.join(head)}) is always trained"
        )
    if "norms" in options.also_train and "ln" in shape.family.refuses:
        yield Conflict("also_train", "norms", "no norms here", shape.family.refuses["ln"])
    tied_parts = {"embeddings", "head"} & set(_whole_parts(options))
    if tied_parts and shape.tied_embeddings and shape.family.embeddings not in (*_TIED_BY_TABLE, *_TIED_BY_HEAD):
        yield Conflict(
            "also_train",
            f"{sorted(tied_parts)[0]} of a model whose {shape.family.embeddings} is tied to its head",
            "{tokens: [...]} or neither",
            "PEFT copies this tied table and the copy would not be used on both sides",
        )


def learning_rate(options: LoraOptions, shape: ModelShape, size: RunSize) -> tuple[float, str]:
    """Return ten times the rate of full fine-tuning for rank 16 at alpha 32; others by the root.

    rate = 10 * full * sqrt(16 / rank) * sqrt(2 / scale), scale = alpha / rank: what B A moves by in a step grows
    with both (docs/quality.md). LoRA+ has its two rates around it.
    """
    scale = options.scale_alpha / (math.sqrt(options.r) if options.rslora else options.r)
    rate = 10 * full_rate_by_law(shape, size) * math.sqrt(_USUAL_RANK / options.r * _USUAL_SCALE / scale)
    if options.lr_ratio is not None:
        rate /= math.sqrt(options.lr_ratio)
    if shape.task_head.modules and "causal-lm" in shape.family.heads:
        rate /= 2  # a decoder's new head reads one token: at the law's own rate it collapsed where that was measured
    return rate, f"by the width of {shape.dims.hidden}, rank {options.r} and {size} (docs/quality.md)"


METHOD = Method(
    name="lora",
    summary="low-rank adapters on linear layers",
    options=LoraOptions,
    count=count,
    peft=peft,
    learning_rate=learning_rate,
    default_roles=linear_roles,
    conflicts=conflicts,
    reaches_parameters=True,
)
