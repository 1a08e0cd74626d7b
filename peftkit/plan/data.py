"""The data section of a plan: sources, format, columns, loss mask, truncation and length."""

from __future__ import annotations

from typing import Any

from peftkit.archs import ModelShape
from peftkit.objectives import FORMAT_TASKS
from peftkit.plan.decisions import DecisionLog
from peftkit.plan.facts import Facts
from peftkit.plan.plan import DataPlan
from peftkit.recipe.paths import redact_url
from peftkit.recipe.schema import Source


def _describe_source(source: object) -> Any:
    """Describe a data source in words; a share or None is returned as it is."""
    if not isinstance(source, Source):
        return redact_url(source) if isinstance(source, str) else source
    settings = source.model_dump(exclude_unset=True, exclude={"path", "columns", "format"})
    details = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"{redact_url(source.path)} ({details})" if details else redact_url(source.path)


def data_plan(d: DecisionLog, facts: Facts) -> DataPlan:
    """Plan sources, format, columns, mask, truncation and length; refuse what does not combine."""
    data = d.loaded.recipe.data
    d.record("data.train", [_describe_source(source) for source in data.sources])
    d.record("data.eval", _describe_source(data.eval))
    if data.group is not None:
        d.record("data.group", data.group)
    d.record("data.columns", dict(data.columns))
    detected_format = facts.data.format if facts.data else None
    kind = str(d.record("data.format", data.format, detected_format, "from the columns of the data"))
    if data.eval and facts.data and facts.data.num_eval == 0:
        d.decide("data.eval", None, "too few distinct rows to hold any out")
    # choose which tokens are in the loss
    task = facts.model.shape.task
    if kind in {"preference", "unpaired-preference"} and d.to_train:
        got = "preferences: peftkit can check them, but has no preference objective (such as DPO or KTO) yet"
        fix = "to train on the chosen answers: columns: {completion: chosen} with format: prompt-completion"
        if kind == "unpaired-preference":
            fix = "keep the rows with good answers and remove the column that rates them"
        d.refuse("data.format", got, "data with one answer a row, each to be learned", fix)
    mask_source = d.loaded.source(("data", "mask"))
    if task != "causal-lm":
        if mask_source:
            d.refuse(
                "data.mask", f"a mask for {task}", "no mask", "only decoders can be trained on a part of the tokens"
            )
        if task == "seq2seq":
            d.decide("data.mask", "all", "the encoder reads what comes before, the loss is on the last answer")
        mask = "all"
    elif kind != "text":
        mask = str(d.record("data.mask", data.mask))
    else:
        if data.mask != "all" and mask_source and data.format == "auto":
            fix = "raw text has no completion: every token is in the loss"
            d.refuse("data.mask", f"{data.mask} on raw text", "all", fix)
        d.decide("data.mask", "all", "raw text: every token is in the loss")
        mask = "all"
    is_weighted = bool(facts.data and facts.data.weighted)
    if is_weighted:
        d.decide("data.weights", True, "rows or turns have weights: the loss is computed from the logits")
    task = facts.model.shape.task
    best, why = "drop", "a truncated answer teaches the model to stop early"
    if kind == "text" and task == "causal-lm":
        best, why = "split", "raw text continues in the next row"
    truncation = str(d.record("data.truncation", d.loaded.recipe.data.truncation, best, why))
    if truncation in {"keep_end", "split"} and task != "causal-lm":
        fix = "an encoder needs the start that its special tokens mark"
        d.refuse("data.truncation", f"{truncation} for {task}", "drop or error", fix)
    chat = d.loaded.recipe.data.chat
    for name in ("template", "system", "thinking"):
        if d.loaded.source(("data", "chat", name)):
            if kind in {"text", "seq2seq", *FORMAT_TASKS}:
                d.refuse(f"data.chat.{name}", f"a setting of chats for {kind} data", "nothing")
            d.record(f"data.chat.{name}", getattr(chat, name))
    if facts.text is not None:
        for name in ("template", "system", "thinking") if facts.text.template == "none" else ():
            if d.loaded.source(("data", "chat", name)):
                d.refuse(f"data.chat.{name}", "a setting of chats", "nothing, as no row is a chat", "leave it out")
        if facts.text.template != "none":
            d.decide("data.chat.template", facts.text.template, "stored with the result")
            d.decide("data.answers_by", "markers" if facts.text.marked else "prefixes", facts.text.spans_reason)
        d.decide("data.pad_token", facts.text.pad, facts.text.pad_reason)
        if facts.text.ends:
            d.decide("data.ends", list(facts.text.ends), "the last tokens of an answer that are in the loss")
    num_virtual_tokens = getattr(d.loaded.recipe.method, "virtual_tokens", 0)
    max_length = choose_max_length(d, facts.model.shape, num_virtual_tokens)
    if facts.data and facts.data.format in FORMAT_TASKS and len(facts.data.labels) < 2:
        classes = ", ".join(facts.data.labels) or "none"
        d.refuse("data.train", f"rows of the one class {classes}", "at least two classes", "is the column right?")
    return DataPlan(
        train=tuple(redact_url(source.path) for source in data.sources),
        eval=_describe_source(data.eval),
        format=kind,
        columns=dict(data.columns),
        mask=mask,
        truncation=truncation,
        max_length=max_length,
        chat_template=data.chat.template,
        system=data.chat.system,
        waive=tuple(data.waive),
        weighted=is_weighted,
    )


_DEFAULT_MAX_LENGTH = 2048
_MAX_ROPE_FACTOR = 32  # YaRN was tried up to this (Peng et al. 2023)


def context_length(d: DecisionLog, shape: ModelShape) -> int:
    """Return the positions of the model, times the RoPE factor; 0 means no limit."""
    scaling = d.loaded.recipe.base.rope_scaling
    return int((scaling.trained or shape.dims.positions) * scaling.factor) if scaling else shape.dims.positions


def rope_overrides(d: DecisionLog, shape: ModelShape) -> dict[str, Any]:
    """Return the configuration's entries for the recipe's RoPE scaling.

    linear: positions divided by the factor (Chen et al. 2023); dynamic: the base grows with the length (NTK);
    yarn: frequencies interpolated by wavelength (Peng et al. 2023).
    """
    scaling = d.loaded.recipe.base.rope_scaling
    if scaling is None:
        return {}
    if shape.positions != "rope":
        d.refuse(
            "base.rope_scaling",
            f"RoPE scaling on {shape.family.name}",
            "a family with rotary positions",
            f"its positions are: {shape.positions}",
        )
        return {}
    if shape.rope_type != "default":
        d.refuse(
            "base.rope_scaling",
            f"RoPE scaling on a base whose positions are scaled already ({shape.rope_type})",
            "one RoPE scaling",
            "its trained positions include it: leave rope_scaling out",
        )
        return {}
    d.record("base.rope_scaling.kind", scaling.kind)
    d.record("base.rope_scaling.factor", scaling.factor)
    trained = d.record("base.rope_scaling.trained", scaling.trained or shape.dims.positions)
    if scaling.trained and scaling.kind == "dynamic":
        got, fix = "trained with kind dynamic", "leave it out: transformers begins to scale at config.json's positions"
        d.refuse("base.rope_scaling.trained", got, "kind yarn or linear", fix)
    if trained > shape.dims.positions:
        got, most = f"{trained} positions", f"at most {shape.dims.positions}, as config.json has it"
        d.refuse("base.rope_scaling.trained", got, most, "leave it out")
    return {"rope_scaling": {"kind": scaling.kind, "factor": scaling.factor, "trained": trained}}


def choose_max_length(d: DecisionLog, shape: ModelShape, virtual_tokens: int) -> int:
    """Choose tokens per row: as written, or 2048 if the model has as many positions. Refuses more.

    Virtual tokens take positions too, learned or rotary.
    """
    limit = context_length(d, shape)
    room = limit - virtual_tokens
    prompt_note = f", after {virtual_tokens} virtual tokens" if virtual_tokens else ""
    length_option = d.loaded.recipe.train.max_length
    if limit and room < 1:
        d.refuse("method.virtual_tokens", str(virtual_tokens), f"fewer than the model's {limit} positions")
        return _DEFAULT_MAX_LENGTH
    default_length = min(_DEFAULT_MAX_LENGTH, room) if limit else _DEFAULT_MAX_LENGTH
    why = (
        f"all of the model's {limit} positions{prompt_note}"
        if default_length < _DEFAULT_MAX_LENGTH
        else "usual for tuning"
    )
    max_length = int(d.record("train.max_length", length_option, default_length, why))
    if not limit or max_length <= room:
        return max_length
    scaling = d.loaded.recipe.base.rope_scaling
    trained = (scaling.trained if scaling else None) or shape.dims.positions
    factor = -(-(max_length + virtual_tokens) // trained)
    if shape.positions != "rope" or shape.rope_type != "default" or factor > _MAX_ROPE_FACTOR:
        fix = "the model was trained on no more positions"
    elif scaling:
        fix = f"raise base.rope_scaling.factor to {factor}"
    else:
        fix = f"shorten, or set base.rope_scaling: {{kind: yarn, factor: {factor}}}"
    expected = f"at most {room}, the positions it was trained on{prompt_note}"
    d.refuse("train.max_length", str(max_length), expected, fix)
    return max_length
