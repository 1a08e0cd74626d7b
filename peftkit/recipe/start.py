"""What a recipe takes from the adapter that it starts from: its base and its settings, from PEFT's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.recipe.paths import path_exists
from peftkit.recipe.vocabulary import own_items, own_parts

_NAMES = {"LORA": "lora", "IA3": "ia3", "VERA": "vera", "OFT": "oft", "LN_TUNING": "ln"}
_NAMES |= {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
# PEFT's key -> ours
_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "LORA": {
        **{"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "use_dora": "dora"},
        **{"target_modules": "targets", "target_parameters": "target_parameters", "layers_to_transform": "layers"},
        **{"exclude_modules": "exclude", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"},
        "modules_to_save": "also_train",
    },
    "IA3": {"target_modules": "targets", "feedforward_modules": "feedforward"},
    "VERA": {
        **{"r": "rank", "vera_dropout": "dropout", "d_initial": "d_initial", "projection_prng_key": "seed"},
        "target_modules": "targets",
    },
    "OFT": {"oft_block_size": "block_size", "module_dropout": "dropout", "target_modules": "targets"},
    "LN_TUNING": {},
    "PREFIX_TUNING": {"num_virtual_tokens": "virtual_tokens"},
    "PROMPT_TUNING": {"num_virtual_tokens": "virtual_tokens"},
}
# of the file rather than of the adapter, without effect on its own, or what follows from the model
_IGNORED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "layers_pattern", "fan_in_fan_out", "megatron_core", "megatron_config", "eva_config"),
    *("corda_config", "loftq_config", "lora_ga_config", "qalora_group_size", "runtime_config", "eps", "r"),
    *("ensure_weight_tying", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"),
    *("encoder_hidden_size", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    *("tokenizer_kwargs", "modules_to_save", "target_modules"),
}
_USUAL = {"bias": "none", "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "save_projection": True}
_USUAL |= dict.fromkeys(("init_lora_weights", "init_ia3_weights", "init_weights"), True)
_SHAPES: Mapping[str, Any] = {
    **dict.fromkeys(("target_modules", "exclude_modules"), str | list | None),
    **dict.fromkeys(("modules_to_save", "target_parameters"), list | None),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), dict | None),
}
_FREE = ("dropout",)  # may differ from one training of an adapter to the next
_DATA_INITS = ("gaussian", "orthogonal", "eva")  # they choose the start of A and B and leave the base alone


def adapter_folder(path: Path, where: str) -> Path:
    """Return the folder with the adapter of a run, or `path` itself. Raises UserError where there is none."""
    if not path_exists(path):
        fix = "one of the hub is downloaded first: hf download OWNER/NAME --local-dir DIR"
        raise UserError(Problem(where, f"{path}, which does not exist", "a finished run, or an adapter folder", fix))
    if (path / "plan.json").is_file():
        if (path / "model").is_dir():
            got = f"{path}, a run of full fine-tuning"
            raise UserError(
                Problem(where, got, "a run with an adapter, or an adapter", f"train on it: base: {path}/model")
            )
        if not (path / "adapter").is_dir():
            fix = f"finish it: peftkit resume {path}"
            raise UserError(Problem(where, f"{path}, a run without a result", "a finished run", fix))
        return path / "adapter"
    if not (path / "adapter_config.json").is_file():
        raise UserError(Problem(where, f"{path} without adapter_config.json", "a finished run, or an adapter folder"))
    return path


def settings_of(folder: Path, where: str, name: str | None) -> dict[str, Any]:
    """Return the sections `base` and `method` of a recipe that describes the adapter in a folder.

    `name` is the method that the recipe names, if any: LoRA may go on with its base in 4 bit or without. Raises
    UserError for adapters that peftkit cannot go on training.
    """
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        identity = json.loads((folder / "peftkit.json").read_text()) if (folder / "peftkit.json").is_file() else {}
        kind = str(config["peft_type"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(Problem(str(file), f"no configuration of PEFT ({error!r})", "an adapter's")) from None
    if kind not in _SETTINGS:
        raise UserError(Problem(where, f"an adapter of type {kind}", f"one of {', '.join(_SETTINGS)}"))
    base = identity.get("base") if isinstance(identity, dict) else None
    quantization = base.get("quantization") if isinstance(base, dict) else None
    method: dict[str, Any] = {"name": _NAMES[kind]}
    if kind == "LORA" and (name == "qlora" or (name is None and quantization)):
        method = {"name": "qlora"}
        if isinstance(quantization, dict) and "double" in quantization:
            method |= {"quant_type": quantization["type"], "double_quant": quantization["double"]}
    if name is not None and name != method["name"]:
        fix = f"write method: {method['name']}, or leave it out"
        raise UserError(Problem(where, f"an adapter of type {kind} for method {name}", f"one of {name}", fix))
    settings = _SETTINGS[kind]
    problems = [
        Problem(str(file), f"{key}: {json.dumps(value)}", "a setting that peftkit can train on", "train a new adapter")
        for key, value in config.items()
        if key not in settings and key not in _IGNORED and value not in (None, False, "none", [], {}, _USUAL.get(key))
        if not (key == "init_lora_weights" and value in _DATA_INITS)
    ]
    if "target_modules" in settings and not config.get("target_modules"):
        problems.append(Problem(str(file), "no target_modules", "modules that are adapted", "train a new adapter"))
    for key in settings.keys() & _SHAPES.keys():
        if not isinstance(config.get(key), _SHAPES[key]):
            problems.append(Problem(f"{file} {key}", f"{json.dumps(config[key])}", "names, as PEFT saves them"))
    if problems:
        raise UserError(problems)
    for key, ours in settings.items():
        value = config.get(key)
        if ours in {"targets", "exclude"}:
            # PEFT takes a text for a regular expression of whole names
            method[ours] = [f"match:{value}"] if isinstance(value, str) else sorted(value or ())
        elif ours in {"rank_pattern", "alpha_pattern"}:
            method[ours] = own_items(value or {})
        elif ours == "also_train":
            method[ours] = own_parts([name for name in value or () if name not in {"score", "classifier"}])
        elif ours == "target_parameters":
            method[ours] = list(value or ())
        elif value is not None or ours == "layers":
            method[ours] = value
    named = config.get("base_model_name_or_path")
    base_section = {"id": named, "revision": config.get("revision")} if isinstance(named, str) and named else {}
    return {"base": {key: value for key, value in base_section.items() if value}, "method": method}


def differences(given: Mapping[str, Any], start: Mapping[str, Any]) -> list[str]:
    """Return the settings of a method section that are not those of the adapter that it starts from."""
    return [key for key, value in given.items() if key not in _FREE and key in start and value != start[key]]


def is_complete(method: object) -> bool:
    """Return whether a method section says all that would be taken from an adapter, as that of a run does."""
    kinds = {_NAMES[kind]: settings for kind, settings in _SETTINGS.items()}
    if not isinstance(method, Mapping):
        return False
    settings = kinds.get(str(method.get("name")).removeprefix("q"))
    return settings is not None and set(settings.values()) <= set(method)
