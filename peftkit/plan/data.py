"""What is read, how it becomes text and tokens, and what of it is learnt."""

from __future__ import annotations

from typing import Any

from peftkit.archs import ModelShape
from peftkit.plan.decisions import Decisions
from peftkit.plan.facts import Facts, TextFacts
from peftkit.plan.plan import DataPlan
from peftkit.plan.task import FORMAT_TASKS
from peftkit.recipe.paths import shown
from peftkit.recipe.schema import Source


def _mask(d: Decisions, facts: Facts, kind: str) -> str:
    """Which tokens count in the loss."""
    data, task = d.loaded.recipe.data, facts.model.shape.task
    if kind == "preference" and d.to_train:
        got = "preferences: peftkit checks them, and trains on no objective that compares answers yet"
        fix = "to learn the chosen answers: columns: {completion: chosen} with format: prompt-completion"
        d.refuse("data.format", got, "data with one answer a row", fix)
    written = d.loaded.source(("data", "mask"))
    if task != "causal-lm":
        if written:
            d.refuse(
                "data.mask", f"a mask for {task}", "no mask", "only decoders learn a part of what they read"
            )
        if task == "seq2seq":
            d.decide("data.mask", "all", "the encoder reads what comes before, the last answer is learnt")
        return "all"
    if kind != "text":
        return str(d.keep("data.mask", data.mask))
    if data.mask != "all" and written and data.format == "auto":
        fix = "raw text has no completion: every token is learnt"
        d.refuse("data.mask", f"{data.mask} on raw text", "all", fix)
    d.decide("data.mask", "all", "raw text: every token is learnt")
    return "all"


def _check_classes(d: Decisions, facts: Facts) -> None:
    """A classifier of one class learns nothing and is always right."""
    if facts.data and facts.data.format in FORMAT_TASKS and len(facts.data.labels) < 2:
        found = ", ".join(facts.data.labels) or "none"
        d.refuse(
            "data.train", f"rows of the one class {found}", "at least two classes", "is the column right?"
        )


def _named(source: Any) -> Any:
    """A source of data in words; a share or nothing stays what it is."""
    if not isinstance(source, Source):
        return shown(source) if isinstance(source, str) else source
    rest = source.model_dump(exclude_unset=True, exclude={"path", "columns", "format"})
    told = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"{shown(source.path)} ({told})" if told else shown(source.path)


def _truncation(d: Decisions, facts: Facts, kind: str) -> str:
    """What becomes of rows that are longer than the model is to see."""
    task = facts.model.shape.task
    best, why = "drop", "a cut answer teaches to stop early"
    if kind == "text" and task == "causal-lm":
        best, why = "split", "raw text goes on in another row"
    truncation = str(d.keep("data.truncation", d.loaded.recipe.data.truncation, best, why))
    if truncation in {"keep_end", "split"} and task != "causal-lm":
        fix = "an encoder needs the start that its special tokens mark"
        d.refuse("data.truncation", f"{truncation} for {task}", "drop or error", fix)
    return truncation


def _chat(d: Decisions, kind: str) -> None:
    """How chats become text, as far as the recipe says it."""
    chat = d.loaded.recipe.data.chat
    for name in ("template", "system", "thinking"):
        if d.loaded.source(("data", "chat", name)):
            if kind in {"text", "classification", "token-classification", "seq2seq"}:
                d.refuse(f"data.chat.{name}", f"a setting of chats for {kind} data", "nothing")
            d.keep(f"data.chat.{name}", getattr(chat, name))


def _text(d: Decisions, text: TextFacts) -> None:
    """What the tokenizer settles. Settings of chats are refused where it met none."""
    for name in ("template", "system", "thinking") if text.template == "none" else ():
        if d.loaded.source(("data", "chat", name)):
            d.refuse(
                f"data.chat.{name}", "a setting of chats", "none, where no row has turns", "leave it out"
            )
    if text.template != "none":
        d.decide("data.chat.template", text.template, "stored with the result")
        d.decide("data.answers_by", "markers" if text.marked else "prefixes", text.spans_reason)
    d.decide("data.pad_token", text.pad, text.pad_reason)
    if text.ends:
        d.decide("data.ends", list(text.ends), "the last tokens that are learnt of an answer")


def data_plan(d: Decisions, facts: Facts) -> DataPlan:
    """Sources, format, columns, mask, truncation and length; what does not go together is refused."""
    data = d.loaded.recipe.data
    d.keep("data.train", [_named(source) for source in data.sources])
    d.keep("data.eval", _named(data.eval))
    if data.group is not None:
        d.keep("data.group", data.group)
    d.keep("data.columns", dict(data.columns))
    found = facts.data.format if facts.data else None
    kind = str(d.keep("data.format", data.format, found, "from the columns of the data"))
    if data.eval and facts.data and facts.data.num_eval == 0:
        d.decide("data.eval", None, "too few different rows to hold any out")
    mask = _mask(d, facts, kind)
    weighted = bool(facts.data and facts.data.weighted)
    if weighted:
        d.decide("data.weights", True, "rows or turns bring weights: the loss is worked out from the logits")
    truncation = _truncation(d, facts, kind)
    _chat(d, kind)
    if facts.text is not None:
        _text(d, facts.text)
    virtual = getattr(d.loaded.recipe.method, "virtual_tokens", 0)
    max_length = choose_max_length(d, facts.model.shape, virtual)
    _check_classes(d, facts)
    return DataPlan(
        train=tuple(shown(source.path) for source in data.sources),
        eval=_named(data.eval),
        format=kind,
        columns=dict(data.columns),
        mask=mask,
        truncation=truncation,
        max_length=max_length,
        chat_template=data.chat.template,
        system=data.chat.system,
        waive=tuple(data.waive),
        weighted=weighted,
    )


_USUAL_LENGTH = 2048


def context_length(d: Decisions, shape: ModelShape) -> int:
    """Positions that the model can tell apart: the trained ones, times the RoPE factor; 0: no limit."""
    scaling = d.loaded.recipe.base.rope_scaling
    return int(shape.dims.positions * scaling.factor) if scaling else shape.dims.positions


def rope_overrides(d: Decisions, shape: ModelShape) -> dict[str, Any]:
    """The configuration's entries for the recipe's RoPE scaling.

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
            f"RoPE scaling on a base that stretches its positions already ({shape.rope_type})",
            "one stretching",
            "its trained positions count that in: leave rope_scaling out",
        )
        return {}
    d.keep("base.rope_scaling.kind", scaling.kind)
    d.keep("base.rope_scaling.factor", scaling.factor)
    return {"rope_scaling": {"kind": scaling.kind, "factor": scaling.factor, "trained": shape.dims.positions}}


def choose_max_length(d: Decisions, shape: ModelShape, virtual_tokens: int) -> int:
    """Tokens per row: as written, or 2048 where the model has so many positions. Refuses more than it has.

    Learned positions stand for virtual tokens too; rotary ones were trained on no more.
    """
    limit = context_length(d, shape)
    room = limit - virtual_tokens
    behind = f", behind {virtual_tokens} virtual tokens" if virtual_tokens else ""
    wanted = d.loaded.recipe.train.max_length
    if limit and room < 1:
        d.refuse("method.virtual_tokens", str(virtual_tokens), f"fewer than the model's {limit} positions")
        return _USUAL_LENGTH
    best = min(_USUAL_LENGTH, room) if limit else _USUAL_LENGTH
    why = f"all of the model's {limit} positions{behind}" if best < _USUAL_LENGTH else "usual for tuning"
    max_length = int(d.keep("train.max_length", wanted, best, why))
    if not limit or max_length <= room:
        return max_length
    factor = -(-(max_length + virtual_tokens) // shape.dims.positions)
    if shape.positions != "rope" or shape.rope_type != "default":
        fix = "the model was trained on no more positions"
    elif d.loaded.recipe.base.rope_scaling:
        fix = f"raise base.rope_scaling.factor to {factor}"
    else:
        fix = f"shorten, or set base.rope_scaling: {{kind: yarn, factor: {factor}}}"
    expected = f"at most {room}, the positions it was trained on{behind}"
    d.refuse("train.max_length", str(max_length), expected, fix)
    return max_length
