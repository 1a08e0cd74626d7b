"""Facts of a model card, read from a run directory or a PEFT adapter folder. Nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from peftkit.archs import EMBEDDED
from peftkit.diagnose.statistics import wilson_interval
from peftkit.errors import Problem, UserError
from peftkit.model.adapter.attach import PEFT_TASKS
from peftkit.model.adapter.load import ADAPTER_WEIGHTS, read_adapter_config
from peftkit.model.base.file_checks import check_adapter_weights, check_model_folder
from peftkit.model.base.identity import IDENTITY_FILE, read_identity
from peftkit.model.base.remote_code import find_model_file
from peftkit.plan import read_plan
from peftkit.plan.plan import BasePlan
from peftkit.recipe.paths import is_data_path, is_url, redact_url
from peftkit.rundir import RunDir, read_sealed
from peftkit.rundir.events import (
    DataEvent,
    DoneEvent,
    EvalEvent,
    Event,
    MemoryEvent,
    MetricEvent,
    ParametersEvent,
    VerdictEvent,
    last_of,
    of_type,
)
from peftkit.ship.card.card import BaseFacts, CardFacts, Layout, Score, TrainingDataFacts, is_hub_id

_PROPORTION_METRICS = {"exact_match", "accuracy"}  # of answers: these have Wilson's interval
_MAX_README_BYTES = 2**20
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def read_run_facts(
    run: RunDir, *, name: str = "", layout: Layout | None = None, merge_report: Mapping[str, object] | None = None
) -> CardFacts:
    """Read the facts of a finished run, for its own result or for what was made from it.

    `layout` is that of the result unless it was merged or exported. `name` is the repository or folder that
    the card goes to. Raises UserError where the run's files are not as they were written.
    """
    plan = read_plan(run)
    events = run.events()
    environment = read_sealed(run.path / "environment.json")
    result = run.adapter if plan.method.peft else run.model
    fingerprints = environment["fingerprints"]
    parameters: Mapping[str, Any] = last_of(events, ParametersEvent) or {}
    memory: Mapping[str, Any] = last_of(events, MemoryEvent) or {}
    verdict = last_of(events, VerdictEvent)
    train = plan.train
    peft: Mapping[str, Any] = plan.method.peft.arguments if plan.method.peft else {}
    start = {"trained on from": Path(plan.method.start_from).name} if plan.method.start_from else {}
    run_settings = (
        _peft_settings(peft)
        | start
        | {
            "learning rate": train.learning_rate,
            "schedule": f"{train.schedule}, {train.num_warmup_steps} warm-up steps",
            "optimizer": train.optimizer,
            "optimizer steps": train.num_steps,
            "batch size": train.batch_size,
            "maximum length, tokens": plan.data.max_length,
            "packing": train.packing,
            "autocast": train.autocast,
            "seed": str(plan.seed),
        }
    )
    counts: Mapping[str, Any] = last_of(events, DataEvent) or {}
    sha256 = fingerprints.get("data")
    sources = plan.data.train
    data_facts = TrainingDataFacts(
        # without folders, passwords and queries
        names=tuple(redact_url(s) if is_url(s) else Path(s).name if is_data_path(s) else s for s in sources),
        hub_ids=tuple(name for name in sources if not is_data_path(name) and is_hub_id(name)),
        num_train=counts.get("num_train"),
        num_eval=counts.get("num_eval"),
        num_tokens=counts.get("num_tokens"),
        num_learnt=counts.get("num_learnt"),
        sha256=sha256,
        mask=plan.data.mask,
    )
    return CardFacts(
        layout=layout or ("adapter" if plan.method.peft else "model"),
        name=name,
        task=plan.base.task,
        labels=plan.base.labels,
        chats=_has_chat_template(result),
        base=_run_base_facts(plan.base, fingerprints["base"]),
        method=plan.method.name,
        settings=run_settings,
        rank=_max_rank(peft),
        plain_lora=plan.method.peft is not None and _is_plain_lora(plan.method.peft.class_name, peft),
        data=data_facts,
        num_trainable=parameters.get("num_trainable"),
        num_total=parameters.get("num_total"),
        planned_bytes=memory.get("predicted_bytes", plan.memory and plan.memory.peak.allocated_bytes),
        measured_bytes=memory.get("measured_bytes"),
        device=environment["device"].get("name"),
        scores=_read_scores(events),
        verdict=verdict.text if verdict else None,
        merge=merge_report or {},
        versions={key: value for key, value in fingerprints["versions"].items() if value},
    )


def read_adapter_facts(
    folder: Path, *, name: str = "", layout: Layout = "adapter", merge_report: Mapping[str, object] | None = None
) -> CardFacts:
    """Read the facts of an adapter folder without its run, made here or elsewhere, from its own files.

    Raises UserError where the folder holds no adapter, or only a pickled one.
    """
    check_model_folder(folder)
    config = read_adapter_config(folder)
    check_adapter_weights(folder)
    peft_type = str(config.get("peft_type") or "").lower()
    sealed = read_sealed(folder / IDENTITY_FILE) if (folder / IDENTITY_FILE).is_file() else {}
    tasks = {peft_task: task for task, peft_task in PEFT_TASKS.items()}
    versions = {**({"peft": config["peft_version"]} if config.get("peft_version") else {})}
    versions |= {key: value for key, value in sealed.get("versions", {}).items() if value}
    # the base that the adapter names; its identity, where peftkit wrote one, says more
    identity = read_identity(folder)
    source = str(identity.get("id") or config.get("base_model_name_or_path") or "")
    revision = identity.get("revision") or config.get("revision")
    quantization = identity.get("quantization") or {}
    is_there = Path(source).exists() if source else True
    adapter_base_facts = BaseFacts(
        id=source if not is_there and is_hub_id(source) else None,
        said=Path(source).name,
        revision=revision,
        config_sha256=identity.get("config_sha256"),
        weights_sha256=identity.get("weights_sha256"),
        quant_type=quantization.get("type"),
        double_quant=bool(quantization.get("double")),
        **_read_license(source, revision),
    )
    return CardFacts(
        layout=layout,
        name=name,
        task=tasks.get(str(config.get("task_type")), ""),
        chats=_has_chat_template(folder),
        base=adapter_base_facts,
        method=peft_type or None,
        settings=_peft_settings(config),
        rank=_max_rank(config),
        plain_lora=peft_type == "lora" and _is_plain_lora("LoraConfig", config),
        data=TrainingDataFacts(sha256=sealed.get("data")),
        num_trainable=_count_parameters(folder / ADAPTER_WEIGHTS),
        merge=merge_report or {},
        versions=versions,
    )


def _has_chat_template(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TEMPLATE_FILES)


def _run_base_facts(plan: BasePlan, fingerprint: Mapping[str, Any]) -> BaseFacts:
    """Return the facts of a run's base. A folder or a GGUF file has a name, and no id that the Hub knows."""
    embedded = EMBEDDED.get(plan.id.removeprefix("embedded:")) if plan.kind == "embedded" else None
    return BaseFacts(
        id=plan.id if plan.kind == "hub" and is_hub_id(plan.id) else None,
        said=embedded.note if embedded else Path(plan.id).name,
        revision=fingerprint.get("revision"),
        config_sha256=fingerprint.get("config_sha256"),
        weights_sha256=fingerprint.get("weights_sha256"),
        quant_type=plan.quant_type,
        double_quant=plan.double_quant,
        compute_dtype=plan.compute_dtype,
        dtype=plan.dtype,
        **({"license": embedded.licence} if embedded else _read_license(plan.id, plan.revision)),
    )


def _read_license(source: str, revision: str | None) -> dict[str, Any]:
    """Read the licence from the front matter of the base's card, in its folder or the Hub's cache."""
    if not Path(source).is_dir() and not is_hub_id(source):
        return {}
    file = find_model_file(source, "README.md", revision)
    if file is None or file.stat().st_size > _MAX_README_BYTES:
        return {}
    preamble, _, rest = file.read_text(encoding="utf-8", errors="replace").lstrip().partition("---\n")
    try:
        front_matter = yaml.safe_load(rest.partition("\n---")[0]) if not preamble else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # a card that the Hub would not take either says nothing
    keys = ("license", "license_name", "license_link")
    return (
        {key: front_matter[key] for key in keys if isinstance(front_matter.get(key), str)}
        if isinstance(front_matter, dict)
        else {}
    )


_UNSET_VALUES: tuple[Any, ...] = (None, False, (), [], {}, "", "none")  # settings that do nothing
_SHOWN_SETTINGS = (
    *("r", "init_r", "target_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern"),
    *("alpha_pattern", "bias", "lora_bias", "target_modules", "target_parameters", "modules_to_save"),
    *("feedforward_modules", "num_virtual_tokens", "oft_block_size", "init_lora_weights"),
)
_SETTING_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}


def _peft_settings(config: Mapping[str, object]) -> dict[str, Any]:
    """Return PEFT's settings that have an effect, by their common names."""
    settings: dict[str, Any] = {}
    for key in _SHOWN_SETTINGS:
        value = config.get(key)
        if value in _UNSET_VALUES or (key == "init_lora_weights" and value is True):
            continue
        if isinstance(value, dict):
            value = [f"{name}: {item}" for name, item in value.items()]
        settings[_SETTING_NAMES.get(key, key)] = sorted(value) if isinstance(value, list | tuple) else value
    return settings


def _max_rank(config: Mapping[str, object]) -> int | None:
    """Return the largest rank of any module."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=None)


def _is_plain_lora(class_name: str, config: Mapping[str, object]) -> bool:
    """Return whether it is LoRA that every engine knows: one scale, one rank, only the two matrices."""
    lora_settings = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")
    other_settings = ("target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")
    is_unset = all(config.get(key) in _UNSET_VALUES for key in (*lora_settings, *other_settings, "bias"))
    return class_name == "LoraConfig" and is_unset and config.get("init_lora_weights", True) in {True, "gaussian"}


def _count_parameters(file: Path) -> int:
    """Count the numbers in a safetensors file. Raises UserError where it is damaged."""
    try:
        with safe_open(file, framework="np") as tensors:
            return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        got = f"a file that is not safetensors, or is damaged ({error})"
        raise UserError(Problem(str(file), got, "the adapter's weights", "download or write it again")) from None


def _read_scores(events: Sequence[Event]) -> tuple[Score, ...]:
    """Return the held-out results: losses by step, the last diagnosis' interval, the task's metrics."""
    done, verdict = last_of(events, DoneEvent), last_of(events, VerdictEvent)
    losses = {event.step: event.loss for event in of_type(events, EvalEvent)}
    scores = []
    if done is not None and done.published_step in losses:
        after_loss = losses[done.published_step]
        scores.append(Score("evaluation loss, nats per token", after_loss, losses.get(0)))
    if verdict is not None and (loss := verdict.loss):
        name = f"loss at step {verdict.step}, on the held-out half used for the verdict"
        low, high = loss.get("low"), loss.get("high")
        scores.append(Score(name, loss["mean"], None, low, high, loss["num_documents"], "documents"))
    before: Mapping[str, Any] = last_of(events, MetricEvent, when="before") or {}
    after_event: Mapping[str, Any] = last_of(events, MetricEvent, when="after") or {}
    num = after_event.get("num_examples")
    for name, value in after_event.get("scores", {}).items():
        before_value = before.get("scores", {}).get(name)
        interval = wilson_interval(value, num) if name in _PROPORTION_METRICS and num else None
        low, high = (interval.low, interval.high) if interval else (None, None)
        scores.append(Score(name, value, before_value, low, high, num))
    return tuple(scores)
