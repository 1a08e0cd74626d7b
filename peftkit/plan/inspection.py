"""Inspection of a model: its sizes, memory and compute, and the methods that fit, from its shape alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from peftkit.archs import ModelShape
from peftkit.archs.held import HeldFormat, way_out
from peftkit.methods import METHODS
from peftkit.methods.lora import LoraOptions
from peftkit.plan.method import default_selection, nearest_method, refusal_reason, share_in_4bit
from peftkit.plan.rank import preferred_rank
from peftkit.plan.throughput import describe_missing_kernels, missing_kernels
from peftkit.units import html_table, join_names, show_bytes, show_count, show_percent

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: compute-optimal pretraining
_LARGE_CACHE_SHARE = 0.25  # of the weights, both in bf16
_CACHE_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
NF4_BITS = 4.127  # with double quantization (Dettmers et al. 2023, section 3)


@dataclass(frozen=True)
class MethodSupport:
    """Support of a method at its defaults: trainable parameters, or why it cannot train the model."""

    name: str
    works: bool
    num_trainable: int | None
    note: str


@dataclass(frozen=True)
class Inspection:
    """A model in numbers. Sizes of caches are bytes; `cache_bytes_per_token` is by precision of the cache."""

    id: str
    family: str
    model_type: str
    task: str
    attention: str
    positions: str
    context_length: int
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied_embeddings: bool
    norm: str
    activation: str
    num_parameters: int
    num_active: int
    by_role: Mapping[str, int]
    weight_bytes: Mapping[str, int]
    cache_bytes_per_token: Mapping[str, float]
    cache_bytes_at_full_context: Mapping[str, float]
    window: str
    packing: str
    state_bytes_per_sequence: int
    compute: str
    optimal_tokens: int
    data_tokens: int | None
    methods: tuple[MethodSupport, ...]
    mind: tuple[str, ...]
    held_as: str = ""  # quantized weights, and their size

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) rows for a table."""
        heads = f", {self.heads} heads of {self.head_dim}" if self.attention != "none" else ""
        grouped = f", {self.kv_heads} for keys and values" if self.kv_heads != self.heads else ""
        context = f", trained to {show_count(self.context_length)}" if self.context_length else ""
        tied = "tied" if self.tied_embeddings else "untied"
        parts = ", ".join(f"{role} {show_count(num)}" for role, num in self.by_role.items())
        active = f", {show_count(self.num_active)} active" if self.num_active != self.num_parameters else ""
        anatomy = [
            ("family", f"{self.family} ({self.model_type}), for {self.task}"),
            (
                "layers",
                f"{self.num_layers} with hidden size {show_count(self.hidden)}, feed-forward size "
                f"{show_count(self.ffn)}",
            ),
            ("attention", f"{self.attention}{heads}{grouped}"),
            ("positions", f"{self.positions}{context}"),
            ("norms", self.norm),
            ("activation", self.activation),
            ("vocabulary", f"{show_count(self.vocab)}, {tied} head"),
            ("parameters", f"{show_count(self.num_parameters)}{active}"),
            ("by role", parts),
        ]
        costs = [("held as", self.held_as)] if self.held_as else []
        costs += [("weights", ", ".join(f"{k} {show_bytes(v)}" for k, v in self.weight_bytes.items()))]
        if any(self.cache_bytes_per_token.values()):
            per = ", ".join(f"{k} {show_bytes(v)}" for k, v in self.cache_bytes_per_token.items())
            costs.append(("cache per token", per))
            if self.context_length:
                text = ", ".join(f"{k} {show_bytes(v)}" for k, v in self.cache_bytes_at_full_context.items())
                costs.append((f"cache at {show_count(self.context_length)}", text))
            if self.window:
                costs.append(("sliding window", self.window))
        if self.state_bytes_per_sequence:
            text = f"{show_bytes(self.state_bytes_per_sequence)} (bf16), at any length"
            costs.append(("state per sequence", text))
        costs.append(("packing", self.packing))
        costs.append(("compute", self.compute))
        data = f"; your data: about {show_count(self.data_tokens)}" if self.data_tokens is not None else ""
        optimal = f"{show_count(self.optimal_tokens)} tokens (20 per parameter){data}"
        costs.append(("compute-optimal", optimal))
        return [*anatomy, *costs]

    def method_rows(self) -> list[tuple[str, str, str]]:
        """Return (method, trainable parameters at its defaults, note) rows for a table."""
        rows = []
        for answer in self.methods:
            num = answer.num_trainable
            trainable_text = "-" if num is None else f"{show_count(num)} ({show_percent(num / self.num_parameters)})"
            rows.append((answer.name, trainable_text, answer.note))
        return rows

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{escape(text)}</li>" for text in self.mind)
        return f"{html_table(self.rows())}{html_table(self.method_rows())}<ul>{notes}</ul>"


def _method_support(name: str, shape: ModelShape) -> MethodSupport:
    method = METHODS[name]
    reason = refusal_reason(method, shape)
    if reason:
        return MethodSupport(name, False, None, f"{reason}; nearest: {nearest_method(method, shape)}")
    ranks = {"rank": preferred_rank(shape)} if issubclass(method.options, LoraOptions) else {}
    options = method.options(name=name, **ranks)  # type: ignore[call-arg]
    selection = default_selection(method, shape)
    conflicts = list(method.conflicts(options, shape, selection))
    if conflicts:
        return MethodSupport(name, True, None, f"not at its defaults: {conflicts[0].got}; {conflicts[0].fix}")
    note = ""
    if method.quantized:
        note = f"{show_percent(share_in_4bit(shape))} of the base in 4-bit"
    elif method.default_roles is not None:
        note = ", ".join(selection.names[:8]) + (", ..." if len(selection.names) > 8 else "")
    elif not method.mergeable:
        note = "cannot be merged: it adds no weights"
    return MethodSupport(name, True, sum(method.count(options, shape, selection).values()), note)


def unread_keys_note(shape: ModelShape) -> list[str]:
    """Return a note on keys of config.json that the family's table does not read, where there are some."""
    if not shape.unread_keys:
        return []
    names = join_names(shape.unread_keys, max_names=5)
    text = f"config.json has {names}, which peftkit's table of {shape.family.name} does not read: sizes may be wrong; "
    return [f"{text}peftkit plan --trace compares them with the model that transformers builds"]


def large_cache_note(shape: ModelShape) -> list[str]:
    """Return a note on keys and values that take much memory beside the weights at the full context, and ways out."""
    dims = shape.dims
    cache_bytes, weight_bytes = 2 * shape.cache_at(dims.positions), 2 * shape.num_parameters
    if cache_bytes < _LARGE_CACHE_SHARE * weight_bytes:
        return []
    share = show_percent(cache_bytes / weight_bytes)
    text = f"at {dims.positions:,} tokens its keys and values take {show_bytes(cache_bytes)} in bf16, {share} of its "
    text += f"weights, for one sequence: {show_bytes(cache_bytes // 2)} in 8 bits, {show_bytes(cache_bytes // 4)} in 4"
    if shape.attention == "MHA" and dims.heads > 1:
        text += "; each head keeps its own: a base with grouped keys (GQA), a quarter as many, would keep "
        text += f"{show_bytes(cache_bytes // 4)}"
    return [text]


def make_inspection(
    model_id: str, shape: ModelShape, *, data_tokens: int | None = None, held: HeldFormat | None = None
) -> Inspection:
    """Derive the inspection of a model from its shape, and from how its weights are held."""
    dims, family = shape.dims, shape.family
    num_parameters = shape.num_parameters
    num_in_4bit = share_in_4bit(shape) * num_parameters
    num_active = num_parameters  # that one token goes through: of the routed experts, those it is sent to
    used = shape.experts_per_token
    if used:
        num_active -= sum(m.num_parameters * max(0, m.num - used) // m.num for m in shape.modules if m.in_experts)
    missing_packages = missing_kernels(shape)
    window = ""
    if shape.num_windowed:
        window = f"{shape.num_windowed} of {shape.num_cached_layers} layers keep {shape.window:,} tokens"
    notes = [f"it is not trained as it is held: {way_out(model_id, held)}"] if held is not None else []
    notes += [*unread_keys_note(shape), *large_cache_note(shape)]
    # a multiplication and an addition per parameter and token, twice that backward (Kaplan et al. 2020)
    growth = "linear in the length"
    if shape.family.has_attention:
        growth = "quadratic in the length" + (" in its attention layers" if shape.family.is_recurrent else "")
    compute = f"{2 * num_active / 1e9:,.1f} GFLOP a token forward, {6 * num_active / 1e9:,.1f} to train; {growth}"
    return Inspection(
        id=model_id,
        family=family.name,
        model_type=shape.model_type,
        task=" or ".join(family.heads),
        attention=shape.attention,
        positions=shape.positions,
        context_length=dims.positions,
        num_layers=dims.num_layers,
        hidden=dims.hidden,
        ffn=dims.ffn,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        vocab=dims.vocab,
        tied_embeddings=shape.tied_embeddings,
        norm=f"{family.norm}, {family.norm_place}-norm",
        activation=shape.activation,
        num_parameters=num_parameters,
        num_active=num_active,
        by_role=shape.by_role(),
        weight_bytes={
            "fp32": 4 * num_parameters,
            "bf16": 2 * num_parameters,
            "int8": num_parameters,
            "nf4": round(num_in_4bit * NF4_BITS / 8 + (num_parameters - num_in_4bit) * 2),
        },
        cache_bytes_per_token={k: size * shape.cache_per_token for k, size in _CACHE_BYTES.items()},
        cache_bytes_at_full_context={k: size * shape.cache_at(dims.positions) for k, size in _CACHE_BYTES.items()},
        window=window,
        packing="packed documents do not see each other" if family.packs else "packed documents would see each other",
        state_bytes_per_sequence=2 * shape.state_per_sequence,
        compute=compute,
        optimal_tokens=TOKENS_PER_PARAMETER * num_parameters,
        data_tokens=data_tokens,
        methods=tuple(_method_support(name, shape) for name in METHODS),
        held_as=""
        if held is None
        else f"{held.name}, about {show_bytes(num_in_4bit * held.bits / 8 + (num_parameters - num_in_4bit) * 2)}"
        if held.bits
        else held.name,
        mind=(*notes, *family.mind, *((describe_missing_kernels(missing_packages),) if missing_packages else ())),
    )
