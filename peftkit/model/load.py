"""Base and tokenizer, loaded as the plan says: safetensors only, one device, no surprises."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from peftkit.archs import Task
from peftkit.errors import Problem, UserError
from peftkit.hub import hub_is_off, hub_is_there
from peftkit.model.base.file_checks import check_folder, check_size
from peftkit.model.base.gguf import converted_folder
from peftkit.model.base.locate import GATED_FIX, Base, check_pin
from peftkit.model.base.remote_code import check_code, hub_file
from peftkit.model.base.unknown_family import AUTO_CLASSES
from peftkit.model.quantize import after_loading, mended_loading, quantization_config
from peftkit.plan.plan import BasePlan


def loadable(base: Base, where: str) -> str:
    """What `from_pretrained` takes: a hub id, or a folder (GGUF files are converted first)."""
    if base.path is not None and base.path.suffix == ".gguf":
        return str(converted_folder(base, where))
    if base.kind == "embedded":
        check_pin(base, where)
    return base.id if base.path is None else str(base.path)


def _check_files(source: str, plan: BasePlan) -> None:
    """Before the libraries read them: files of a sane size inside their folder, and code that may run."""
    if Path(source).is_dir():
        check_folder(Path(source))
    else:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            check_size(hub_file(source, name, plan.revision))
    check_code(source, plan)


def _from_cache(source: str) -> bool:
    """Whether the libraries must not ask the hub: where nobody answers they retry each file for long."""
    return not Path(source).is_dir() and not hub_is_there()


def _access(error: BaseException, source: str) -> str:
    """What to do where a hub model's files could not be had."""
    from huggingface_hub.errors import GatedRepoError

    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    if any(isinstance(one, GatedRepoError) for one in chain):
        return GATED_FIX
    if not _from_cache(source):
        return ""
    state = "HF_HUB_OFFLINE is set" if hub_is_off() else "the hub cannot be reached"
    return f"{state}, and the cache may lack some of its files: fetch it while there is a hub"


def load_tokenizer(source: str, plan: BasePlan) -> Any:
    """The tokenizer. Raises UserError where the base brings none."""
    from transformers import AutoTokenizer

    _check_files(source, plan)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=plan.revision,
            trust_remote_code=plan.trust_remote_code,
            local_files_only=_from_cache(source),
        )
    except (OSError, ValueError) as error:
        got, expected = f"no tokenizer ({_first_line(error)})", "a tokenizer beside the weights"
        raise UserError(Problem(f"base {plan.id}", got, expected, _access(error, source))) from error
    if tokenizer.eos_token is None and plan.task in {"causal-lm", "seq2seq"}:
        raise UserError(
            Problem(
                f"base {plan.id}",
                "a tokenizer without an end token",
                "an end token",
                "without one the model never learns to stop",
            )
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            Problem(f"base {plan.id}", "a tokenizer without padding or end token", "a padding token")
        )
    if tokenizer.pad_token is None:
        # labels are masked by position, so that a padding token that is the end token hides nothing
        tokenizer.pad_token = _reserved_token(tokenizer) or tokenizer.eos_token
    return tokenizer


_RESERVED = re.compile(r"pad|reserved|unused|placeholder", re.IGNORECASE)


def _reserved_token(tokenizer: Any) -> str | None:
    """A special token that the vocabulary keeps for padding, or for nothing."""
    added = tokenizer.added_tokens_decoder.values()
    names = [token.content for token in added if token.special and _RESERVED.search(token.content)]
    return min(names, key=lambda name: "pad" not in name.lower(), default=None)


def pad_policy(tokenizer: Any) -> tuple[str, str]:
    """(the padding token, why it is that one)."""
    pad = str(tokenizer.pad_token)
    if pad == tokenizer.eos_token:
        return pad, "the end token: labels are masked by position, so ends are still learnt"
    if _RESERVED.search(pad) and "pad" not in pad.lower():
        return pad, "a reserved token that nothing uses"
    return pad, "the tokenizer's own"


def stops_of(source: str, tokenizer: Any) -> frozenset[int]:
    """Token ids at which generation stops: those of generation_config.json, and the tokenizer's end token."""
    file = Path(source) / "generation_config.json"
    known: Any = None
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    ids = known if isinstance(known, list) else [known]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int))


def load_model(
    source: str, plan: BasePlan, *, device: str, tell: Callable[[str], None] = lambda text: None
) -> Any:
    """The base with its weights and the task's head. Raises UserError where it cannot be loaded.

    `tell` hears of what does not stop loading: a head for other classes than the data's, which starts afresh.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    _check_files(source, plan)
    auto = getattr(transformers, AUTO_CLASSES[cast(Task, plan.task)])
    try:
        with mended_loading(plan):
            model, told = auto.from_pretrained(
                source,
                config=_config(source, plan),
                output_loading_info=True,
                revision=plan.revision,
                trust_remote_code=plan.trust_remote_code,
                local_files_only=_from_cache(source),
                adapter_kwargs={"local_files_only": _from_cache(source)},  # it looks for an adapter there too
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told and looked at below
                dtype=getattr(torch, plan.dtype),
                device_map={"": 0 if device == "cuda" else device},
                quantization_config=quantization_config(plan),
                **chosen_attention(plan),
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            Problem(
                f"base {plan.id}",
                f"a model that cannot be loaded ({_first_line(error)})",
                f"a model for {plan.task} with safetensors weights",
                _access(error, source),
            )
        ) from error
    _check_shapes(told["mismatched_keys"], plan, tell)
    missing = sorted(key for key in told["missing_keys"] if not _starts_fresh(key, plan))
    if missing:
        raise UserError(
            Problem(
                f"base {plan.id}",
                f"weights without {len(missing)} tensors (for example {missing[0]})",
                "all of the model's weights",
                "transformers would start them from random numbers",
            )
        )
    after_loading(model, plan)
    return model


def _check_shapes(mismatched: Any, plan: BasePlan, tell: Callable[[str], None]) -> None:
    """Only the task's head may be of another shape than the weights bring."""
    found = sorted((str(item[0]), tuple(item[1]), tuple(item[2])) for item in mismatched)
    wrong = [item for item in found if not _starts_fresh(item[0], plan)]
    if wrong:
        name, brought, wanted = wrong[0]
        got = f"weights of other shapes than config.json says ({name}: {brought} for {wanted})"
        raise UserError(Problem(f"base {plan.id}", got, "weights and configuration of one model"))
    if found:
        name, brought, wanted = found[-1]
        text = f"the base brings a head of {brought[0]} outputs ({name}), the data has {wanted[0]}"
        tell(f"{text}: the head starts afresh")


def _starts_fresh(key: str, plan: BasePlan) -> bool:
    """Whether a tensor belongs to the task's head, which a base does not bring."""
    return any(f".{name}." in f".{key}" for name in plan.head_modules)


def _config(source: str, plan: BasePlan) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        source,
        revision=plan.revision,
        trust_remote_code=plan.trust_remote_code,
        local_files_only=_from_cache(source),
    )
    return configured(config, plan)


def read_config(values: Mapping[str, Any], plan: BasePlan) -> Any:
    """transformers' configuration from the content of a config.json, read as transformers reads the file.

    A base with code of its own is read from where it stands.
    """
    from transformers import AutoConfig

    if plan.trust_remote_code and "auto_map" in values:
        return AutoConfig.from_pretrained(plan.id, revision=plan.revision, trust_remote_code=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(values)), encoding="utf-8")
        return AutoConfig.from_pretrained(folder)


def chosen_attention(plan: BasePlan) -> dict[str, str]:
    """The argument that chooses transformers' attention, where the plan decided it."""
    return {} if plan.attention is None else {"attn_implementation": plan.attention}


def configured(config: Any, plan: BasePlan) -> Any:
    """The configuration with the plan's overrides: labels, a stretched RoPE, what the family needs."""
    values: dict[str, Any] = dict(plan.overrides)
    scaling = values.pop("rope_scaling", None)
    if scaling:
        values |= rope_values(config.to_dict(), scaling)
    if plan.labels:
        names = dict(enumerate(plan.labels))
        values |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    config.update(values)
    return config


def rope_values(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' `rope_parameters` for a kind of scaling, keeping the base frequency.

    Families with two kinds of layers (Gemma 3) hold one set per kind; the sliding ones see no long context.
    """
    stretched = {"rope_type": scaling["kind"], "factor": float(scaling["factor"])}
    if scaling["kind"] == "yarn":
        stretched["original_max_position_embeddings"] = scaling["trained"]
    old = config.get("rope_parameters") or {}
    nested = all(isinstance(value, Mapping) for value in old.values()) and old
    if nested:
        new: Any = {
            kind: {**set_, **stretched} if "full" in kind else dict(set_) for kind, set_ in old.items()
        }
    else:
        kept = {key: old[key] for key in ("rope_theta", "partial_rotary_factor") if key in old}
        new = {**kept, **stretched}
    positions = (
        {}
        if scaling["kind"] == "dynamic"
        else {"max_position_embeddings": int(scaling["trained"] * scaling["factor"])}
    )
    return {"rope_parameters": new, **positions}


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the generation config's and the tokenizer's."""
    known = model.generation_config.eos_token_id if model.generation_config else None
    ids = known if isinstance(known, list) else [known] if known is not None else []
    return list(dict.fromkeys([*ids, tokenizer.eos_token_id]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
