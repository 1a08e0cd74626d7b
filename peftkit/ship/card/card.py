"""Model card: Markdown with the Hub's front matter, rendered from facts alone.

A card says what is known and omits the rest. It holds no secret and no path of the machine that it was
made on, whatever the facts hold. `facts.py` reads the facts; here they only become text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from peftkit.secrets import redact
from peftkit.ship.card.usage import FOLDER_PLACEHOLDER, render_usage
from peftkit.units import join_names, printable, show_bytes, show_count, show_percent

Layout = Literal["adapter", "model", "gguf"]
_RELATIONS: Mapping[Layout, str] = {"adapter": "adapter", "model": "finetune", "gguf": "quantized"}
_LIBRARIES: Mapping[Layout, str] = {"adapter": "peft", "model": "transformers", "gguf": "gguf"}
_PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq": "text2text-generation",
    "classification": "text-classification",
    "multi-label": "text-classification",
    "token-classification": "token-classification",
}
_DTYPES = ("float32", "bfloat16", "float16")
_NAME_PART = r"\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_NAME_PART}(?:/{_NAME_PART})?", re.ASCII)
_REVISION = re.compile(rf"(?!.*\.\.){_NAME_PART}(?:/{_NAME_PART})*", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# a slash, ~ or drive that begins a path; those of URLs and of owner/name stand behind other characters
_ABSOLUTE_PATH = re.compile(r"(?<![\w:/\\.~-])(?:~|[A-Za-z]:|file://|\\)?(?:[/\\][^\s/\\\"'`<>|,;:()]+)+[/\\]?")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|$~])")


@dataclass(frozen=True)
class BaseFacts:
    """Facts of the base: `id` only where the Hub knows it by that; `said` is its name otherwise.

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
class TrainingDataFacts:
    """Facts of the training data: names without folders, and those that are ids of Hub datasets."""

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
    """A metric before and after training, with a 95 % interval over `num` of what `of` names."""

    name: str
    after: float
    before: float | None = None
    low: float | None = None
    high: float | None = None
    num: int | None = None
    of: str = "examples"


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card may state; what is None or empty is unknown, and left out.

    `name` is the repository or folder of the card. `merge` is the content of merge_report.json. `relation` is
    given where neither the layout nor the merge says it.
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
    data: TrainingDataFacts = TrainingDataFacts()
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
    """Return whether a text reads like owner/name (or a bare name such as gpt2), not like a path or a secret."""
    return len(text or "") <= 96 and _is_code_safe(text, _HUB_ID)


def _is_code_safe(text: str | None, shape: re.Pattern[str]) -> bool:
    """Return whether a text may stand in code as it is."""
    return text is not None and shape.fullmatch(text) is not None and redact(text) == text


def strip_paths(text: str) -> str:
    """Shorten the absolute paths in a text to their last part."""
    return _ABSOLUTE_PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def render_card(facts: CardFacts) -> str:
    """Render the card, ending in a line end. The same facts give the same text."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True, width=2**16)
    title = (
        _escape_markdown(facts.name)
        or {"adapter": "Adapter", "model": "Fine-tuned model", "gguf": "Fine-tuned model as GGUF"}[facts.layout]
    )
    parts = [f"---\n{front}---\n", f"# {title}\n", f"{_summary_sentence(facts)}\n"]
    double = " with double quantization" if facts.base.double_quant else ""
    base_rows = [
        ("Hub id", facts.base.id if is_hub_id(facts.base.id) else None),
        ("name", None if is_hub_id(facts.base.id) else facts.base.id or facts.base.said),
        ("revision", facts.base.revision),
        ("configuration, sha256", facts.base.config_sha256),
        ("weights, sha256 of samples", facts.base.weights_sha256),
        ("dtype in training", facts.base.dtype),
        ("quantized in training to", f"4 bits, {facts.base.quant_type}{double}" if facts.base.quant_type else None),
    ]
    classes = join_names(facts.labels, max_names=100) if facts.labels else None
    head = [("method", facts.method), ("task", facts.task), ("classes, in output order", classes)]
    method_rows = [*head, *facts.settings.items()]
    trained, total = facts.num_trainable, facts.num_total
    share = show_percent(trained / total) if trained is not None and total else None
    planned, measured = (
        None if size is None else show_bytes(size) for size in (facts.planned_bytes, facts.measured_bytes)
    )
    size_rows = [
        ("parameters trained", trained),
        ("parameters in total", total),
        ("share trained", share),
        ("peak memory of training, planned", planned),
        ("peak memory of training, measured", measured),
        ("device", facts.device),
    ]
    for heading, rows in (
        ("Base", base_rows),
        ("Method", method_rows),
        (
            "Data",
            [
                ("source", facts.data.names),
                ("examples trained on", facts.data.num_train),
                ("examples held out", facts.data.num_eval),
                ("tokens", facts.data.num_tokens),
                ("tokens in the loss", facts.data.num_learnt),
                ("loss mask", facts.data.mask),
                ("tokens and labels, sha256", facts.data.sha256),
            ],
        ),
        ("Parameters and memory", size_rows),
        ("Loss and metrics", [(score.name, _score_text(score)) for score in facts.scores]),
        ("Verdict", [("peftkit's diagnosis", facts.verdict)]),
        ("Merge fidelity", _fidelity_rows(facts.merge)),
        ("Versions", list(facts.versions.items())),
    ):
        cells = [
            (label, _format_value(value)) for label, value in rows if value is not None and value not in ("", (), [])
        ]
        lines = [f"| {_escape_markdown(label)} | {value} |\n" for label, value in cells]
        if lines:  # only rows that say something, only tables that have rows
            parts.append("".join([f"## {heading}\n\n| | |\n|---|---|\n", *lines]))
    usage = render_usage(
        layout=facts.layout,
        name=_sanitize(facts.name) if is_hub_id(facts.name) and "/" in facts.name else FOLDER_PLACEHOLDER,
        base=facts.base.id if is_hub_id(facts.base.id) else None,
        revision=facts.base.revision if _is_code_safe(facts.base.revision, _REVISION) else None,
        task=facts.task,
        num_labels=len(facts.labels),
        chats=facts.chats,
        dtype=_known_or_none(facts.base.dtype, _DTYPES),
        quant_type=_known_or_none(facts.base.quant_type, ("nf4", "fp4")),
        double_quant=facts.base.double_quant,
        compute_dtype=_known_or_none(facts.base.compute_dtype, _DTYPES),
        rank=facts.rank,
        plain_lora=facts.plain_lora,
    )
    return "\n".join([*parts, usage]).rstrip("\n") + "\n"


def _known_or_none(text: str | None, allowed: Sequence[str]) -> str | None:
    """Return `text` if it is one of `allowed`, else None: only known words stand in code."""
    return text if text in allowed else None


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    base, has_license = facts.base, facts.base.license is not None and _LICENSE.fullmatch(facts.base.license)
    tags = ["peftkit", *([facts.method] if facts.method else [])]
    fields: dict[str, Any] = {
        "library_name": _LIBRARIES[facts.layout],
        "base_model": base.id if is_hub_id(base.id) else None,
        "base_model_relation": (
            facts.relation or ("merge" if len(facts.merge.get("adapters", ())) > 1 else _RELATIONS[facts.layout])
        )
        if is_hub_id(base.id)
        else None,
        "license": base.license if has_license else None,
        "license_name": base.license_name if base.license == "other" else None,
        "license_link": base.license_link if base.license == "other" else None,
        "language": list(facts.languages),
        "datasets": [name for name in facts.data.hub_ids if is_hub_id(name)],
        "pipeline_tag": _PIPELINES.get(facts.task),
        "tags": list(dict.fromkeys(tags)),
    }
    sanitized = {
        key: (list(filter(None, map(_sanitize, value))) if isinstance(value, list) else _sanitize(value))
        for key, value in fields.items()
        if value
    }
    return {key: value for key, value in sanitized.items() if value}


def _sanitize(text: str) -> str:
    """Return a text on one line, without secrets, paths of this machine, and what UTF-8 cannot hold."""
    encodable = text.encode("utf-8", "replace").decode("utf-8")
    return redact(strip_paths(printable(" ".join(encodable.split()))))


def _escape_markdown(text: str) -> str:
    """Return a foreign text escaped for Markdown."""
    return _MARKUP.sub(r"\\\1", _sanitize(text))


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return show_count(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_escape_markdown(str(item)) for item in value)
    return _escape_markdown(str(value))


def _summary_sentence(facts: CardFacts) -> str:
    """Return one sentence on what the model is, and one on its licence."""
    base = facts.base
    base_name = _escape_markdown(base.id or base.said) or "an unnamed base"
    if is_hub_id(base.id):
        base_name = f"[{_escape_markdown(str(base.id))}](https://huggingface.co/{base.id})"
    method = f"{_escape_markdown(facts.method)} " if facts.method else ""
    description = {
        "adapter": f"An adapter ({method.strip() or 'PEFT'}) for {base_name}",
        "model": f"{base_name}, fine-tuned{f' ({method.strip()})' if method else ''}; full weights",
        "gguf": f"{base_name}, fine-tuned{f' ({method.strip()})' if method else ''}, as GGUF",
    }[facts.layout]
    tool = f", made with peftkit {_escape_markdown(facts.versions['peftkit'])}" if "peftkit" in facts.versions else ""
    if base.license:
        name = f" ({_escape_markdown(base.license_name)})" if base.license_name else ""
        licence = f"Licence: {_escape_markdown(base.license)}{name}, inherited from the base."
    else:
        licence = "Licence: unknown; the base does not name one. Ask its owner before sharing this."
    return f"{description}{tool}.\n\n{licence}"


def _score_text(score: Score) -> str:
    before = f"{score.before:.4g} before, " if score.before is not None else ""
    bounds = ""
    if score.low is not None and score.high is not None:
        bounds = f", 95 % interval {score.low:.4g} to {score.high:.4g}"
    num = f" ({show_count(score.num)} {score.of})" if score.num is not None else ""
    return f"{before}{score.after:.4g} after{bounds}{num}"


def _fidelity_rows(merge: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the rows of merge_report.json on the merged model; missing keys are left out."""
    num_prompts, num_tokens = merge.get("num_prompts"), merge.get("num_tokens")
    compared_on = f"{num_prompts} prompts" if num_prompts is not None else None
    if compared_on and num_tokens is not None:
        compared_on += f", {num_tokens} tokens"
    passed = merge.get("passed") if merge.get("kl") is not None else None  # or nothing was compared
    return [
        ("merged into", merge.get("base")),
        ("compared with base and adapter on", compared_on),
        ("KL divergence, nats per token", merge.get("kl")),
        ("largest logit difference", merge.get("max_abs_difference")),
        (
            "same top token",
            None if merge.get("top1_agreement") is None else f"{100 * float(merge['top1_agreement']):.2f} % of tokens",
        ),
        ("loss of base and adapter", merge.get("loss_adapter")),
        ("loss of the merged model", merge.get("loss_merged")),
        ("within tolerance", passed),
    ]
