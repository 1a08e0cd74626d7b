"""What a card may say, read from a run directory or from a PEFT adapter's folder. Nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.archs import EMBEDDED
from peftkit.diagnose.statistics import proportion
from peftkit.errors import Problem, UserError
from peftkit.model.adapter.attach import PEFT_TASKS
from peftkit.model.adapter.load import WEIGHTS, read_adapter_config
from peftkit.model.base.file_checks import check_adapter_weights, check_folder
from peftkit.model.base.identity import IDENTITY, read_identity
from peftkit.model.base.remote_code import hub_file
from peftkit.plan import Plan
from peftkit.plan.plan import BasePlan
from peftkit.recipe.paths import is_data_path, is_url, shown
from peftkit.rundir import RunDir, read_sealed
from peftkit.ship.card.card import BaseFacts, CardFacts, DataFacts, Layout, Score, is_hub_id

_SHARES = {"exact_match", "accuracy"}  # of answers: these have Wilson's interval
_MOST_README_BYTES = 2**20
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def facts_of_run(
    run: RunDir,
    *,
    name: str = "",
    layout: Layout | None = None,
    merge_report: Mapping[str, Any] | None = None,
) -> CardFacts:
    """The facts of a finished run, for its own result or for what was made of it.

    `layout` is that of the result unless it was merged or exported. `name` is the repository or folder that
    the card goes to. Raises UserError where the run's files are not as they were written.
    """
    plan = _plan(run)
    events = run.events()
    environment = read_sealed(run.path / "environment.json")
    result = run.adapter if plan.method.peft else run.model
    known = environment["fingerprints"]
    counted, memory = _last(events, "parameters"), _last(events, "memory")
    peft = dict(plan.method.peft.arguments) if plan.method.peft else {}
    return CardFacts(
        layout=layout or ("adapter" if plan.method.peft else "model"),
        name=name,
        task=plan.base.task,
        labels=plan.base.labels,
        chats=_chats(result),
        base=_base(plan.base, known["base"]),
        method=plan.method.name,
        settings=_settings(plan),
        rank=_rank(peft),
        plain_lora=plan.method.peft is not None and _is_plain(plan.method.peft.class_name, peft),
        data=_data(plan, _last(events, "data"), known.get("data")),
        num_trainable=counted.get("num_trainable"),
        num_total=counted.get("num_total"),
        planned_bytes=memory.get("predicted_bytes", plan.memory and plan.memory.peak.allocated_bytes),
        measured_bytes=memory.get("measured_bytes"),
        device=environment["device"].get("name"),
        scores=_scores(events),
        verdict=_last(events, "verdict").get("text"),
        merge=merge_report or {},
        versions={key: value for key, value in known["versions"].items() if value},
    )


def facts_of_adapter(
    folder: Path, *, name: str = "", layout: Layout = "adapter", merge_report: Mapping[str, Any] | None = None
) -> CardFacts:
    """The facts of an adapter away from its run, made here or elsewhere: what its own files say.

    Raises UserError where the folder holds no adapter, or only a pickled one.
    """
    check_folder(folder)
    config = read_adapter_config(folder)
    check_adapter_weights(folder)
    kind = str(config.get("peft_type") or "").lower()
    sealed = read_sealed(folder / IDENTITY) if (folder / IDENTITY).is_file() else {}
    tasks = {theirs: ours for ours, theirs in PEFT_TASKS.items()}
    versions = {**({"peft": config["peft_version"]} if config.get("peft_version") else {})}
    versions |= {key: value for key, value in sealed.get("versions", {}).items() if value}
    return CardFacts(
        layout=layout,
        name=name,
        task=tasks.get(str(config.get("task_type")), ""),
        chats=_chats(folder),
        base=_adapters_base(config, read_identity(folder)),
        method=kind or None,
        settings=_chosen(config),
        rank=_rank(config),
        plain_lora=kind == "lora" and _is_plain("LoraConfig", config),
        data=DataFacts(sha256=sealed.get("data")),
        num_trainable=_num_parameters(folder / WEIGHTS),
        merge=merge_report or {},
        versions=versions,
    )


def _plan(run: RunDir) -> Plan:
    file = run.path / "plan.json"
    try:
        return Plan.from_json(read_sealed(file))
    except (ValueError, KeyError, TypeError) as error:
        got = f"a plan that cannot be read ({error})"
        raise UserError(Problem(str(file), got, "the plan of a run")) from None


def _last(events: list[dict[str, Any]], name: str, **match: Any) -> dict[str, Any]:
    """The last event of a name; empty where there is none."""
    found = [e for e in events if e["event"] == name and all(e.get(k) == v for k, v in match.items())]
    return found[-1] if found else {}


def _chats(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TEMPLATES)


def _base(plan: BasePlan, known: Mapping[str, Any]) -> BaseFacts:
    """The base of a run. A folder or a GGUF file has a name, and no id that the Hub knows."""
    embedded = EMBEDDED.get(plan.id.removeprefix("embedded:")) if plan.kind == "embedded" else None
    return BaseFacts(
        id=plan.id if plan.kind == "hub" and is_hub_id(plan.id) else None,
        said=embedded.note if embedded else Path(plan.id).name,
        revision=known.get("revision"),
        config_sha256=known.get("config_sha256"),
        weights_sha256=known.get("weights_sha256"),
        quant_type=plan.quant_type,
        double_quant=plan.double_quant,
        compute_dtype=plan.compute_dtype,
        dtype=plan.dtype,
        **({"license": embedded.licence} if embedded else _license(plan.id, plan.revision)),
    )


def _adapters_base(config: Mapping[str, Any], identity: Mapping[str, Any]) -> BaseFacts:
    """The base that an adapter names; its identity, where peftkit wrote one, says more."""
    source = str(identity.get("id") or config.get("base_model_name_or_path") or "")
    revision = identity.get("revision") or config.get("revision")
    quantization = identity.get("quantization") or {}
    is_there = Path(source).exists() if source else True
    return BaseFacts(
        id=source if not is_there and is_hub_id(source) else None,
        said=Path(source).name,
        revision=revision,
        config_sha256=identity.get("config_sha256"),
        weights_sha256=identity.get("weights_sha256"),
        quant_type=quantization.get("type"),
        double_quant=bool(quantization.get("double")),
        **_license(source, revision),
    )


def _license(source: str, revision: str | None) -> dict[str, Any]:
    """The licence in the front matter of the base's own card, from its folder or the Hub's cache."""
    import yaml

    if not Path(source).is_dir() and not is_hub_id(source):
        return {}
    file = hub_file(source, "README.md", revision)
    if file is None or file.stat().st_size > _MOST_README_BYTES:
        return {}
    opened, _, rest = file.read_text(encoding="utf-8", errors="replace").lstrip().partition("---\n")
    try:
        front = yaml.safe_load(rest.partition("\n---")[0]) if not opened else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # a card that the Hub would not take either says nothing
    keys = ("license", "license_name", "license_link")
    return (
        {key: front[key] for key in keys if isinstance(front.get(key), str)}
        if isinstance(front, dict)
        else {}
    )


_QUIET: tuple[Any, ...] = (None, False, (), [], {}, "", "none")  # settings that do nothing
_TELLING = (
    *("r", "init_r", "target_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern"),
    *("alpha_pattern", "bias", "lora_bias", "target_modules", "target_parameters", "modules_to_save"),
    *("feedforward_modules", "num_virtual_tokens", "oft_block_size", "init_lora_weights"),
)
_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings that do something, by the names that people know them by."""
    found: dict[str, Any] = {}
    for key in _TELLING:
        value = config.get(key)
        if value in _QUIET or (key == "init_lora_weights" and value is True):
            continue
        if isinstance(value, dict):
            value = [f"{name}: {item}" for name, item in value.items()]
        found[_NAMES.get(key, key)] = sorted(value) if isinstance(value, list | tuple) else value
    return found


def _settings(plan: Plan) -> dict[str, Any]:
    train = plan.train
    peft = _chosen(plan.method.peft.arguments) if plan.method.peft else {}
    return peft | {
        "learning rate": train.learning_rate,
        "schedule": f"{train.schedule}, {train.num_warmup_steps} steps of warm-up",
        "optimizer": train.optimizer,
        "optimizer steps": train.num_steps,
        "batch size": train.batch_size,
        "longest example, tokens": plan.data.max_length,
        "packing": train.packing,
        "autocast": train.autocast,
        "seed": str(plan.seed),
    }


def _rank(config: Mapping[str, Any]) -> int | None:
    """The largest rank of any module."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=None)


def _is_plain(class_name: str, config: Mapping[str, Any]) -> bool:
    """Whether it is LoRA as every engine knows it: one scale, one rank, nothing beside the two matrices."""
    odd = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")
    more = ("target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")
    is_quiet = all(config.get(key) in _QUIET for key in (*odd, *more, "bias"))
    return (
        class_name == "LoraConfig"
        and is_quiet
        and config.get("init_lora_weights", True) in {True, "gaussian"}
    )


def _named(source: str) -> str:
    """A source of data without folders, passwords and queries."""
    if is_url(source):
        return shown(source)
    return Path(source).name if is_data_path(source) else source


def _data(plan: Plan, counted: Mapping[str, Any], sha256: str | None) -> DataFacts:
    sources = plan.data.train
    return DataFacts(
        names=tuple(map(_named, sources)),
        hub_ids=tuple(name for name in sources if not is_data_path(name) and is_hub_id(name)),
        num_train=counted.get("num_train"),
        num_eval=counted.get("num_eval"),
        num_tokens=counted.get("num_tokens"),
        num_learnt=counted.get("num_learnt"),
        sha256=sha256,
        mask=plan.data.mask,
    )


def _scores(events: list[dict[str, Any]]) -> tuple[Score, ...]:
    """What was measured on held-out data: losses by step, the last look's interval, the task's metrics."""
    done = _last(events, "done")
    losses = {event["step"]: event["loss"] for event in events if event["event"] == "eval"}
    found = []
    if (after := losses.get(done.get("published_step"))) is not None:
        found.append(Score("evaluation loss, nats a token", after, losses.get(0)))
    looked = _last(events, "verdict")
    if loss := looked.get("loss"):
        name = f"loss at step {looked['step']}, on the held-out half that the verdict is of"
        low, high = loss.get("low"), loss.get("high")
        found.append(Score(name, loss["mean"], None, low, high, loss["num_documents"], "documents"))
    before, after_event = _last(events, "metric", when="before"), _last(events, "metric", when="after")
    num = after_event.get("num_examples")
    for name, value in after_event.get("scores", {}).items():
        first = before.get("scores", {}).get(name)
        interval = proportion(value, num) if name in _SHARES and num else None
        low, high = (interval.low, interval.high) if interval else (None, None)
        found.append(Score(name, value, first, low, high, num))
    return tuple(found)


def _num_parameters(file: Path) -> int:
    """Numbers in a safetensors file. Raises UserError where it is damaged."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as found:
            return sum(prod(found.get_slice(name).get_shape()) for name in found.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        got = f"a file that is not safetensors, or is damaged ({error})"
        raise UserError(Problem(str(file), got, "the adapter's weights", "fetch or write it again")) from None
