"""The model card of what leaves the project: Markdown with the Hub's front matter, from facts alone.

A card says what is known and keeps silent on the rest. It holds no secret and no path of the machine that it
was made on, whatever the facts hold. `card_facts.py` reads the facts; here they only become text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peftkit.secrets import redact
from peftkit.ship.card.usage import HERE, Use, how_to_load
from peftkit.units import listed, printable, show_bytes, show_count, show_percent

Layout = Literal["adapter", "model", "gguf"]
_RELATIONS: Mapping[Layout, str] = {"adapter": "adapter", "model": "finetune", "gguf": "quantized"}
_LIBRARIES: Mapping[Layout, str] = {"adapter": "peft", "model": "transformers", "gguf": "gguf"}
_PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq": "text2text-generation",
    "classification": "text-classification",
    "token-classification": "token-classification",
}
_DTYPES = ("float32", "bfloat16", "float16")
_PART = r"\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_PART}(?:/{_PART})?", re.ASCII)
_REVISION = re.compile(rf"(?!.*\.\.){_PART}(?:/{_PART})*", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# a slash, ~ or drive that begins a path; those of URLs and of owner/name stand behind other characters
_ABSOLUTE = re.compile(r"(?<![\w:/\\.~-])(?:~|[A-Za-z]:|file://|\\)?(?:[/\\][^\s/\\\"'`<>|,;:()]+)+[/\\]?")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|$~])")


@dataclass(frozen=True)
class BaseFacts:
    """The base: `id` only where the Hub knows it by that, `said` how people name it otherwise.

    `license_name` and `license_link` go with the licence "other", as the Hub has it.
    """

    id: str | None = None
    said: str = ""
    revision: str | None = None
    config_sha256: str | None = None
    weights_sha256: str | None = None
    quant_type: str | None = None
    double_quant: bool = False
    compute_dtype: str | None = None
    dtype: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


@dataclass(frozen=True)
class DataFacts:
    """What was learnt from: names without folders, and those of them that are ids of Hub datasets."""

    names: tuple[str, ...] = ()
    hub_ids: tuple[str, ...] = ()
    num_train: int | None = None
    num_eval: int | None = None
    num_tokens: int | None = None
    num_learnt: int | None = None
    sha256: str | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Score:
    """A number before and after training; the bounds are of 95 %, over `num` of what `of` says."""

    name: str
    after: float
    before: float | None = None
    low: float | None = None
    high: float | None = None
    num: int | None = None
    of: str = "examples"


@dataclass(frozen=True)
class CardFacts:
    """All that a card may say; what is None or empty is unknown, and left out.

    `name` is the repository or folder that the card lies in. `merge` is the content of merge_report.json.
    `relation` is given where neither the layout nor the merge says it.
    """

    layout: Layout
    name: str = ""
    relation: str | None = None
    task: str = "causal-lm"
    labels: tuple[str, ...] = ()
    chats: bool = False
    base: BaseFacts = BaseFacts()
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # hyper-parameters, in the order shown
    rank: int | None = None
    plain_lora: bool = False  # nothing in it that engines for LoRA refuse
    data: DataFacts = DataFacts()
    languages: tuple[str, ...] = ()
    num_trainable: int | None = None
    num_total: int | None = None
    planned_bytes: int | None = None
    measured_bytes: int | None = None
    device: str | None = None
    scores: tuple[Score, ...] = ()
    verdict: str | None = None
    merge: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def is_hub_id(text: str | None) -> bool:
    """Whether a name reads like owner/name (or a name of the Hub's own), not like a path or a secret."""
    return len(text or "") <= 96 and _is_plain(text, _HUB_ID)


def _is_plain(text: str | None, shape: re.Pattern[str]) -> bool:
    """Whether a text may stand in code as it is."""
    return text is not None and shape.fullmatch(text) is not None and redact(text) == text


def without_paths(text: str) -> str:
    """The text with absolute paths cut down to their last part."""
    return _ABSOLUTE.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def card_of(facts: CardFacts) -> str:
    """The card, ending in a line end. The same facts give the same text."""
    import yaml

    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True, width=2**16)
    title = _said(facts.name) or _title(facts)
    parts = [f"---\n{front}---\n", f"# {title}\n", f"{_sentence(facts)}\n"]
    for heading, rows in (
        ("Base", _base(facts.base)),
        ("Method", _method(facts)),
        ("Data", _data(facts.data)),
        ("Parameters and memory", _sizes(facts)),
        ("Loss and metrics", _scores(facts.scores)),
        ("Verdict", [("peftkit's diagnosis", facts.verdict)]),
        ("Merge fidelity", _fidelity(facts.merge)),
        ("Versions", list(facts.versions.items())),
    ):
        if table := _table(rows):
            parts.append(f"## {heading}\n\n{table}")
    use = Use(
        layout=facts.layout,
        name=_plain(facts.name) if is_hub_id(facts.name) and "/" in facts.name else HERE,
        base=facts.base.id if is_hub_id(facts.base.id) else None,
        revision=facts.base.revision if _is_plain(facts.base.revision, _REVISION) else None,
        task=facts.task,
        num_labels=len(facts.labels),
        chats=facts.chats,
        dtype=_one_of(facts.base.dtype, _DTYPES),
        quant_type=_one_of(facts.base.quant_type, ("nf4", "fp4")),
        double_quant=facts.base.double_quant,
        compute_dtype=_one_of(facts.base.compute_dtype, _DTYPES),
        rank=facts.rank,
        plain_lora=facts.plain_lora,
    )
    parts.append(how_to_load(use))
    return "\n".join(parts)


def _one_of(text: str | None, known: Sequence[str]) -> str | None:
    """What stands in code is known, or left out."""
    return text if text in known else None


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    base, known = facts.base, facts.base.license is not None and _LICENSE.fullmatch(facts.base.license)
    tags = ["peftkit", *([facts.method] if facts.method else [])]
    found: dict[str, Any] = {
        "library_name": _LIBRARIES[facts.layout],
        "base_model": base.id if is_hub_id(base.id) else None,
        "base_model_relation": _relation(facts) if is_hub_id(base.id) else None,
        "license": base.license if known else None,
        "license_name": base.license_name if base.license == "other" else None,
        "license_link": base.license_link if base.license == "other" else None,
        "language": list(facts.languages),
        "datasets": [name for name in facts.data.hub_ids if is_hub_id(name)],
        "pipeline_tag": _PIPELINES.get(facts.task),
        "tags": list(dict.fromkeys(tags)),
    }
    plain = {key: _plain_value(value) for key, value in found.items() if value}
    return {key: value for key, value in plain.items() if value}


def _relation(facts: CardFacts) -> str:
    """To the base, in the Hub's words: "merge" is of several models."""
    made = "merge" if len(facts.merge.get("adapters", ())) > 1 else _RELATIONS[facts.layout]
    return facts.relation or made


def _plain_value(value: Any) -> Any:
    return list(filter(None, map(_plain, value))) if isinstance(value, list) else _plain(value)


def _plain(text: str) -> str:
    """A text on one line without secrets, paths of this machine, and what no UTF-8 file can hold."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return redact(without_paths(printable(" ".join(whole.split()))))


def _said(text: str) -> str:
    """A foreign text in Markdown: shown as it is, steering nothing."""
    return _MARKUP.sub(r"\\\1", _plain(text))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return show_count(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_said(str(item)) for item in value)
    return _said(str(value))


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    """The rows that say something as a table; empty where none does."""
    kept = [(what, _value(value)) for what, value in rows if value is not None and value not in ("", (), [])]
    lines = [f"| {_said(what)} | {value} |\n" for what, value in kept]
    return "".join(["| | |\n|---|---|\n", *lines]) if lines else ""


def _title(facts: CardFacts) -> str:
    return {"adapter": "Adapter", "model": "Fine-tuned model", "gguf": "Fine-tuned model as GGUF"}[
        facts.layout
    ]


def _sentence(facts: CardFacts) -> str:
    """What it is, in one sentence, and its licence in another."""
    base = facts.base
    named = _said(base.id or base.said) or "a base that is not named"
    if is_hub_id(base.id):
        named = f"[{_said(str(base.id))}](https://huggingface.co/{base.id})"
    method = f"{_said(facts.method)} " if facts.method else ""
    what = {
        "adapter": f"An adapter ({method.strip() or 'PEFT'}) for {named}",
        "model": f"{named}, fine-tuned{f' ({method.strip()})' if method else ''}; its weights are whole",
        "gguf": f"{named}, fine-tuned{f' ({method.strip()})' if method else ''}, as GGUF",
    }[facts.layout]
    made = f", made with peftkit {_said(facts.versions['peftkit'])}" if "peftkit" in facts.versions else ""
    if base.license:
        name = f" ({_said(base.license_name)})" if base.license_name else ""
        licence = f"Licence: {_said(base.license)}{name}, inherited from the base."
    else:
        licence = "Licence: unknown; the base at hand names none. Ask its owner before passing this on."
    return f"{what}{made}.\n\n{licence}"


def _base(base: BaseFacts) -> list[tuple[str, Any]]:
    double = " with double quantization" if base.double_quant else ""
    return [
        ("Hub id", base.id if is_hub_id(base.id) else None),
        ("name", None if is_hub_id(base.id) else base.id or base.said),
        ("revision", base.revision),
        ("configuration, sha256", base.config_sha256),
        ("weights, sha256 of samples", base.weights_sha256),
        ("held in, in training", base.dtype),
        ("quantized to, in training", f"4 bits, {base.quant_type}{double}" if base.quant_type else None),
    ]


def _method(facts: CardFacts) -> list[tuple[str, Any]]:
    classes = listed(facts.labels, most=100) if facts.labels else None
    head = [("method", facts.method), ("task", facts.task), ("classes, as the outputs are", classes)]
    return [*head, *facts.settings.items()]


def _data(data: DataFacts) -> list[tuple[str, Any]]:
    return [
        ("source", data.names),
        ("examples trained on", data.num_train),
        ("examples held out", data.num_eval),
        ("tokens", data.num_tokens),
        ("tokens learnt", data.num_learnt),
        ("what is learnt (mask)", data.mask),
        ("tokens and labels, sha256", data.sha256),
    ]


def _sizes(facts: CardFacts) -> list[tuple[str, Any]]:
    trained, total = facts.num_trainable, facts.num_total
    share = show_percent(trained / total) if trained is not None and total else None
    planned, measured = (
        None if size is None else show_bytes(size) for size in (facts.planned_bytes, facts.measured_bytes)
    )
    return [
        ("parameters trained", trained),
        ("parameters in all", total),
        ("share trained", share),
        ("peak memory of training, planned", planned),
        ("peak memory of training, measured", measured),
        ("device", facts.device),
    ]


def _scores(scores: Sequence[Score]) -> list[tuple[str, Any]]:
    return [(score.name, _score(score)) for score in scores]


def _score(score: Score) -> str:
    before = f"{score.before:.4g} before, " if score.before is not None else ""
    bounds = ""
    if score.low is not None and score.high is not None:
        bounds = f", 95 % interval {score.low:.4g} to {score.high:.4g}"
    num = f" ({show_count(score.num)} {score.of})" if score.num is not None else ""
    return f"{before}{score.after:.4g} after{bounds}{num}"


def _fidelity(merge: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What merge_report.json says of the merged model beside base and adapter; missing keys are left out."""
    num_prompts, num_tokens = merge.get("num_prompts"), merge.get("num_tokens")
    over = f"{num_prompts} prompts" if num_prompts is not None else None
    if over and num_tokens is not None:
        over += f", {num_tokens} tokens"
    passed = merge.get("passed") if merge.get("kl") is not None else None  # or nothing was compared
    return [
        ("merged into", merge.get("base")),
        ("compared with base and adapter on", over),
        ("KL divergence, nats a token", merge.get("kl")),
        ("largest difference of a logit", merge.get("max_abs_difference")),
        ("same first choice", None if merge.get("top1_agreement") is None else _share(merge)),
        ("loss of base and adapter", merge.get("loss_adapter")),
        ("loss of the merged model", merge.get("loss_merged")),
        ("within tolerance", passed),
    ]


def _share(merge: Mapping[str, Any]) -> str:
    return f"{100 * float(merge['top1_agreement']):.2f} % of tokens"
