"""Loading of base and tokenizer as the plan says: safetensors only, on one device."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError

from peftkit.archs import Task
from peftkit.archs.held import held_format
from peftkit.errors import Problem, UserError, first_line
from peftkit.hub import hub_is_offline, hub_is_reachable
from peftkit.model.base.dequantize import dequantize_base
from peftkit.model.base.file_checks import check_file_size, check_model_folder
from peftkit.model.base.gguf import convert_gguf_base
from peftkit.model.base.locate import GATED_FIX, LocatedBase, check_embedded_sha256
from peftkit.model.base.progress_bar import without_progress_bar
from peftkit.model.base.remote_code import check_remote_code, find_model_file
from peftkit.model.base.unknown_family import AUTO_CLASSES
from peftkit.model.quantize import build_quantization_config, finish_4bit_loading, patched_loading
from peftkit.model.rope import rope_parameters
from peftkit.plan.plan import BasePlan
from peftkit.units import join_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def resolve_source(base: LocatedBase, where: str, *, need_weights: bool = True) -> str:
    """Return the source for `from_pretrained`: a hub id or a folder.

    GGUF files are converted first, and quantized checkpoints with `need_weights`; a tokenizer needs none.
    """
    if need_weights and (held := held_format(base.config or {})) is not None:
        return str(dequantize_base(base, held, where))
    if base.path is not None and base.path.suffix == ".gguf":
        return str(convert_gguf_base(base, where))
    if base.kind == "embedded":
        check_embedded_sha256(base, where)
    return base.id if base.path is None else str(base.path)


def _check_files(source: str, plan: BasePlan) -> None:
    """Check file sizes, symlinks and trusted code before the libraries read anything. Raises UserError."""
    if Path(source).is_dir():
        check_model_folder(Path(source))
    else:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            check_file_size(find_model_file(source, name, plan.revision))
    check_remote_code(source, plan)


def _is_cache_only(source: str) -> bool:
    """Return whether to use the cache only: without a connection the libraries retry each file for long."""
    return not Path(source).is_dir() and not hub_is_reachable()


def _access_fix(error: BaseException, source: str) -> str:
    """Return the fix for a hub model whose files could not be read, or an empty text."""
    from huggingface_hub.errors import GatedRepoError

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(isinstance(exception, GatedRepoError) for exception in chain):
        return GATED_FIX
    if not _is_cache_only(source):
        return ""
    state = "HF_HUB_OFFLINE is set" if hub_is_offline() else "the hub cannot be reached"
    return f"{state}, and the cache may lack some of its files: download it while the hub can be reached"


def load_tokenizer(source: str, plan: BasePlan) -> PreTrainedTokenizerBase:
    """Load the tokenizer. Raises UserError where the base has none, or not the end token that the plan names."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    _check_files(source, plan)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=plan.revision,
            trust_remote_code=plan.trust_remote_code,
            local_files_only=_is_cache_only(source),
        )
    except (OSError, ValueError) as error:
        got, expected = f"no tokenizer ({first_line(error)})", "a tokenizer beside the weights"
        files = "tokenizer.json and tokenizer_config.json, and chat_template.jinja where there is one,"
        copy_fix = f"copy {files} from the model's repository into {source}"
        fix = copy_fix if Path(source).is_dir() else _access_fix(error, source)
        raise UserError(Problem(f"base {plan.id}", got, expected, fix)) from error
    if plan.new_tokens:
        # not special ones, which decoding would hide in answers
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plan.new_tokens])
    if plan.end_token is not None:
        if plan.end_token not in tokenizer.get_vocab():
            fix = f"it has {join_names(special_tokens(tokenizer), 8)}"
            got = f"{plan.end_token!r}, which the tokenizer of {plan.id} lacks"
            raise UserError(Problem("data.chat.end_token", got, "a token of its vocabulary", fix))
        tokenizer.eos_token = plan.end_token
    if tokenizer.pad_token is None:
        # labels are masked by position, so that a padding token that is the end token hides nothing
        added_tokens = tokenizer.added_tokens_decoder.values()
        names = [token.content for token in added_tokens if token.special and _RESERVED_TOKEN.search(token.content)]
        reserved_token = min(names, key=lambda name: "pad" not in name.lower(), default=None)
        tokenizer.pad_token = reserved_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens of a tokenizer, those first that look like the end of a text or a turn."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*names, *tokenizer.all_special_tokens}, key=lambda name: (not _END_TOKEN.search(name), name))


_RESERVED_TOKEN = re.compile(r"pad|reserved|unused|placeholder", re.IGNORECASE)
_END_TOKEN = re.compile(r"end|eo[st]|</s>", re.IGNORECASE)


def explain_pad_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return (padding token, reason for the choice)."""
    pad_token = str(tokenizer.pad_token)
    if pad_token == tokenizer.eos_token:
        return (
            pad_token,
            "the EOS token: labels are masked by position, so it stays in the loss at the end of answers",
        )
    if _RESERVED_TOKEN.search(pad_token) and "pad" not in pad_token.lower():
        return pad_token, "an unused reserved token"
    return pad_token, "the tokenizer's own"


def read_stop_ids(source: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Read the token ids that stop generation: generation_config.json's and the tokenizer's EOS."""
    file = Path(source) / "generation_config.json"
    eos_token_id: Any = None
    if file.is_file():
        eos_token_id = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int))


def load_model(
    source: str, plan: BasePlan, *, device: str, on_warning: Callable[[str], None] = lambda text: None
) -> PreTrainedModel:
    """Load the base with its weights and the task's head. Raises UserError where it cannot be loaded.

    `on_warning` is called with what does not stop loading: a head for another number of classes, which is
    newly initialised.
    """
    import torch
    import transformers

    _check_files(source, plan)
    auto_class = getattr(transformers, AUTO_CLASSES[cast(Task, plan.task)])
    try:
        with patched_loading(plan), without_progress_bar():
            config = transformers.AutoConfig.from_pretrained(
                source,
                revision=plan.revision,
                trust_remote_code=plan.trust_remote_code,
                local_files_only=_is_cache_only(source),
            )
            load_config = apply_overrides(config, plan)
            model, loading_info = auto_class.from_pretrained(
                source,
                config=load_config,
                output_loading_info=True,
                revision=plan.revision,
                trust_remote_code=plan.trust_remote_code,
                local_files_only=_is_cache_only(source),
                adapter_kwargs={"local_files_only": _is_cache_only(source)},  # it looks for an adapter there too
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told and looked at below
                dtype=getattr(torch, plan.dtype),
                device_map={"": torch.cuda.current_device() if device == "cuda" else device},
                quantization_config=build_quantization_config(plan),
                **attention_argument(plan),
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            Problem(
                f"base {plan.id}",
                f"a model that cannot be loaded ({first_line(error)})",
                f"a model for {plan.task} with safetensors weights",
                _access_fix(error, source),
            )
        ) from error
    # raise UserError for mismatched shapes outside the task's head
    mismatched = loading_info["mismatched_keys"]
    mismatches = sorted((str(mismatch[0]), tuple(mismatch[1]), tuple(mismatch[2])) for mismatch in mismatched)
    unexpected = [mismatch for mismatch in mismatches if not _is_head_tensor(mismatch[0], plan)]
    if unexpected:
        name, loaded_shape, expected_shape = unexpected[0]
        got = f"weights whose shapes differ from config.json ({name}: {loaded_shape} for {expected_shape})"
        raise UserError(Problem(f"base {plan.id}", got, "weights and configuration of the same model"))
    if mismatches:
        name, loaded_shape, expected_shape = mismatches[-1]
        message = f"the base has a head of {loaded_shape[0]} outputs ({name}), the data has {expected_shape[0]}"
        on_warning(f"{message}: the head is newly initialised")
    missing = sorted(key for key in loading_info["missing_keys"] if not _is_head_tensor(key, plan))
    if missing:
        raise UserError(
            Problem(
                f"base {plan.id}",
                f"weights without {len(missing)} tensors (for example {missing[0]})",
                "all of the model's weights",
                "transformers would initialise them at random",
            )
        )
    finish_4bit_loading(model, plan)
    if plan.new_tokens:
        tokenizer = load_tokenizer(source, replace(plan, new_tokens={}))
        known = tokenizer.get_vocab()  # a merged model brings the tokens, with their trained rows
        if added := {token: text for token, text in plan.new_tokens.items() if token not in known}:
            _add_token_rows(model, load_tokenizer(source, plan), added)
    return model


def _add_token_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: Mapping[str, str]) -> None:
    """Give new tokens their rows of the embeddings, and of a head of its own, in place.

    A row starts as the mean of the rows of its text's tokens, or of all that the tokenizer had.
    """
    import torch

    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in new_tokens}
    if max(ids.values()) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids.values()) + 1, mean_resizing=False)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    with torch.no_grad():
        for table in tables.values():
            mean = table[: min(ids.values())].mean(dim=0, dtype=torch.float32)
            for token, text in new_tokens.items():
                of_text = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
                table[ids[token]] = (table[of_text].float().mean(dim=0) if of_text else mean).to(table.dtype)


def _is_head_tensor(key: str, plan: BasePlan) -> bool:
    """Return whether a tensor belongs to the task's head, which a base need not have."""
    return any(f".{name}." in f".{key}" for name in plan.head_modules)


def read_config(values: Mapping[str, object], plan: BasePlan) -> PreTrainedConfig:
    """Build transformers' configuration from the content of a config.json, as transformers reads the file.

    A base with code of its own is read from its source.
    """
    from transformers import AutoConfig

    if plan.trust_remote_code and "auto_map" in values:
        return AutoConfig.from_pretrained(plan.id, revision=plan.revision, trust_remote_code=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(values)), encoding="utf-8")
        return AutoConfig.from_pretrained(folder)


def attention_argument(plan: BasePlan) -> dict[str, str]:
    """Return the argument that selects transformers' attention, empty where the plan leaves it open."""
    return {} if plan.attention is None else {"attn_implementation": plan.attention}


def apply_overrides(config: Any, plan: BasePlan) -> PreTrainedConfig:
    """Apply the plan's overrides in place: labels, RoPE scaling, and what the family needs."""
    values: dict[str, Any] = dict(plan.overrides)
    scaling = values.pop("rope_scaling", None)
    if scaling:
        values |= rope_parameters(config.to_dict(), scaling)
    if plan.labels:
        names = dict(enumerate(plan.labels))
        values |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    if plan.task == "multi-label":
        values["problem_type"] = "multi_label_classification"
    config.update(values)
    return config


def model_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that stop generation: the generation config's and the tokenizer's EOS."""
    eos_token_id = model.generation_config.eos_token_id if model.generation_config else None
    ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id] if eos_token_id is not None else []
    return [i for i in dict.fromkeys([*ids, tokenizer.eos_token_id]) if i is not None]
