"""The keys of other tools' configurations, and what each is in a recipe.

Sources: the documented options of transformers' TrainingArguments, TRL's configurations, PEFT's LoraConfig, Axolotl
and LLaMA-Factory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import yaml

Value = TypeVar("Value")
Translation = Callable[[object, Mapping[str, object]], str]  # of a value, with the keys beside it
# our key: what others call it, with a value of the same meaning
_SAME = {
    "base": "base_model model_name_or_path model_name model pretrained_model_name_or_path",
    "start_from": "adapter_name_or_path lora_model_dir adapters",
    "base.trust_remote_code": "trust_remote_code trust_remote_code_tokenizer",
    "base.revision": "model_revision revision_of_model",
    "method.rank": "r lora_r lora_rank rank_dim",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.dora": "use_dora peft_use_dora",
    "method.rslora": "use_rslora peft_use_rslora",
    "method.lr_ratio": "loraplus_lr_ratio",
    "method.target_parameters": "lora_target_parameters",
    "method.virtual_tokens": "num_virtual_tokens",
    "train.epochs": "num_train_epochs num_epochs n_epochs",
    "train.learning_rate": "lr",
    "train.micro_batch": "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size "
    "micro_batch_size_per_gpu",
    "train.batch_size": "train_batch_size global_batch_size total_batch_size",
    "train.max_length": "max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size",
    "train.packing": "sample_packing neat_packing",
    "train.gradient_checkpointing": "activation_checkpointing",
    "train.max_grad_norm": "gradient_clipping clip_grad_norm",
    "train.neftune": "neftune_noise_alpha noisy_embedding_alpha",
    "train.label_smoothing": "label_smoothing_factor",
    "train.checkpoint_steps": "save_steps",
    "train.early_stopping.patience": "early_stopping_patience",
    "data.train": "dataset_name dataset_path train_data_path",
    "data.eval": "val_set_size val_size test_size eval_dataset test_datasets val_files validation_file test_split_size",
    "data.format": "dataset_format",
    "data.chat.system": "system_prompt default_system",
    "evaluate.max_new_tokens": "generation_max_new_tokens",
    "seed": "data_seed random_seed",
}
_NOT_YET = "peftkit has none yet: leave it out"


def by_value(
    key: str, values: Mapping[str, str], *, is_name: bool = True, instead: Mapping[str, str] | None = None
) -> Translation:
    """Return a translation by a table of values; another value is kept, a name of a choice in small letters.

    `instead` has what to do for values that have no translation.
    """

    def translate(value: object, _: Mapping[str, object]) -> str:
        if instead and str(value).lower() in instead:
            return instead[str(value).lower()]
        kept = value.lower() if is_name and isinstance(value, str) else value
        return f"{key}: {values.get(str(value).lower(), _show(kept))}"

    return translate


def translate_targets(value: object, _: Mapping[str, object]) -> str:
    """Return the targets: a list of modules, which LLaMA-Factory writes as one text."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if names in (["all"], ["all-linear"]):
        return "method.targets: all-linear"
    return f"method.targets: {_show(names)}"


def translate_accumulation(value: object, siblings: Mapping[str, object]) -> str:
    """Return the batch size, which counts the rows of all micro-batches."""
    names = ("micro_batch", *_SAME["train.micro_batch"].split())
    micro = next((siblings[name] for name in names if name in siblings), 1)
    if not isinstance(value, int) or not isinstance(micro, int) or bool in {type(value), type(micro)}:
        return "train.batch_size: micro_batch times this"
    return f"train.batch_size: {value * micro}"


def translate_datasets(value: object, _: Mapping[str, object]) -> str:
    """Return the sources: of Axolotl's list of mappings what a source here has too."""
    sources = value if isinstance(value, list) else [value]
    kept = [
        {key: one[key] for key in ("path", "split", "revision") if key in one} if isinstance(one, Mapping) else one
        for one in sources
    ]
    return f"data.train: {_show(kept if isinstance(value, list) else kept[0])}"


def own_parts(names: Iterable[str]) -> list[str]:
    """Return modules that are trained whole as `also_train` names them, each once."""
    return sorted({_PARTS.get(name.rpartition(".")[2] if name.count(".") < 2 else name, name) for name in names})


def own_items(pattern: Mapping[str, Value]) -> dict[str, Value]:
    """Return one of PEFT's patterns with our items: its keys are ends of names, or regular expressions of them."""
    return {
        f"match:(.*\\.)?({name})" if re.search(r"[^\w.]", str(name)) else name: value for name, value in pattern.items()
    }


def translate_modules(value: object, _: Mapping[str, object]) -> str:
    """Return the parts that modules trained whole are, or what to do where they are none of ours."""
    names = [value] if isinstance(value, str) else list(map(str, value)) if isinstance(value, list) else []
    if not names:
        return "leave it out"
    if set(names) <= {"score", "classifier"}:
        return "leave it out: the head of a classifier is always trained"
    return f"method.also_train: {_show(own_parts(names))}"


def translate_pattern(key: str) -> Translation:
    """Return a translation of one of PEFT's patterns."""

    def translate(value: object, _: Mapping[str, object]) -> str:
        if not value or not isinstance(value, Mapping):
            return "leave it out" if not value else f"{key}: {{NAME: VALUE}}"
        return f"{key}: {_show(own_items(value))}"

    return translate


def translate_switch(value: object, siblings: Mapping[str, object]) -> str:
    """Return the method of a switch for adapters; beside one for 4 bit, that says it."""
    if siblings.get("load_in_4bit") or siblings.get("quantization_bit") == 4:
        return "leave it out: method.name: qlora says it"
    return by_value("method.name", {"true": "lora", "false": "full"})(value, siblings)


def translate_warmup(value: object, siblings: Mapping[str, object]) -> str:
    """Return the share of the warm-up; where its steps are given as well, those count, as in transformers."""
    if any(siblings.get(name) for name in _WARMUP_STEPS):
        return "leave it out: the steps of the warm-up count"
    return f"train.schedule.warmup: {_show(value)}"


_PARTS = {
    **dict.fromkeys(("embed_tokens", "wte", "word_embeddings", "embeddings", "embed_in"), "embeddings"),
    **dict.fromkeys(("lm_head", "head", "output", "embed_out"), "head"),
}
_WARMUP_STEPS = ("warmup_steps", "num_warmup_steps", "lr_warmup_steps")
_AUTO = {"false": "leave it out: the precision is chosen then"}
_NO_INIT = "leave it out, or take method.init: gaussian, orthogonal, pissa, olora or eva"
_SCHEDULES = {
    **{"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "cosine_with_restarts": "restarts"},
    "warmup_stable_decay": "wsd",
}
_OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit", "paged_adamw_32bit": "adamw_torch", "adamw_torch_8bit": "adamw_bnb_8bit"}
_INITS = {"true": "default", "pissa_niter_16": "pissa"}
_NO_INITS = dict.fromkeys(("false", "loftq", "corda", "lora_ga"), _NO_INIT)
_TRANSLATIONS: dict[str, Translation] = {
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target", "lora_targets"), translate_targets),
    "gradient_accumulation_steps": translate_accumulation,
    **dict.fromkeys(("dataset", "datasets", "train_file", "train_files", "data_path"), translate_datasets),
    "lr_scheduler_type": by_value("train.schedule.kind", _SCHEDULES),
    "lr_scheduler": by_value("train.schedule.kind", _SCHEDULES),
    "optim": by_value("train.optimizer", _OPTIMIZERS),
    "init_lora_weights": by_value("method.init", _INITS, instead=_NO_INITS),
    "peft_init_lora_weights": by_value("method.init", _INITS, instead=_NO_INITS),
    "adapter": by_value("method.name", {}),
    "peft_type": by_value("method.name", {"prefix_tuning": "prefix", "prompt_tuning": "prompt"}),
    "finetuning_type": by_value("method.name", {}, instead={"freeze": f"training some of the layers: {_NOT_YET}"}),
    "use_lora": translate_switch,
    "use_peft": translate_switch,
    "load_in_4bit": by_value("method.name", {"true": "qlora"}, instead={"false": "leave it out"}),
    "warmup_ratio": translate_warmup,
    **dict.fromkeys(_WARMUP_STEPS, by_value("train.schedule.warmup_steps", {}, instead={"0": "leave it out"})),
    "quantization_bit": by_value("method.name", {"4": "qlora"}),
    "bnb_4bit_use_double_quant": by_value("method.double_quant", {}),
    "use_bnb_nested_quant": by_value("method.double_quant", {}),
    "double_quantization": by_value("method.double_quant", {}),
    "bf16": by_value("train.precision", {"true": "bf16"}, instead=_AUTO),
    "fp16": by_value("train.precision", {"true": "fp16"}, instead=_AUTO),
    "torch_dtype": by_value("train.precision", {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}),
    "flash_attention": by_value("base.attention", {"true": "sdpa", "false": "auto"}),
    "flash_attn": by_value("base.attention", {"fa2": "sdpa", "true": "sdpa", "disabled": "eager"}),
    "attn_implementation": by_value("base.attention", {"flash_attention_2": "sdpa", "flash_attention_3": "sdpa"}),
    "train_on_inputs": by_value("data.mask", {"true": "all", "false": "completion"}),
    "train_on_prompt": by_value("data.mask", {"true": "all", "false": "completion"}),
    "completion_only_loss": by_value("data.mask", {"true": "completion", "false": "all"}),
    "assistant_only_loss": by_value("data.mask", {"true": "assistant", "false": "all"}),
    "mask_history": by_value("data.mask", {"true": "last-turn", "false": "completion"}),
    "task_type": by_value("task", {"causal_lm": "causal-lm", "seq_2_seq_lm": "seq2seq", "seq_cls": "classification"}),
    "modules_to_save": translate_modules,
    "lora_modules_to_save": translate_modules,
    **{key: translate_pattern(f"method.{key}") for key in ("rank_pattern", "alpha_pattern")},
    "exclude_modules": by_value("method.exclude", {}, is_name=False),
    "layers_to_transform": by_value("method.layers", {}),
}
# what has no key: what to do instead
_WITHOUT_KEY = {
    "output_dir logging_dir": "give the folder on the command line: --out DIR",
    "report_to wandb_project use_wandb mlflow_experiment_name use_mlflow run_name wandb_name": f"trackers: {_NOT_YET}",
    "deepspeed fsdp fsdp_config ddp_timeout local_rank tensor_parallel_size": f"several GPUs: {_NOT_YET}",
    "logging_steps": "every step is logged: leave it out",
    "save_strategy save_total_limit evaluation_strategy eval_strategy load_best_model_at_end": "checkpoints are "
    "written at each evaluation, the last two and the best are kept, and the best is the result: leave it out",
    "do_train do_eval stage remove_unused_columns tokenizer_type model_type ddp_find_unused_parameters strict tf32 "
    "is_llama_derived_model overwrite_output_dir overwrite_cache dataloader_num_workers num_workers": "peftkit "
    "decides this itself: leave it out",
    "bias lora_bias fan_in_fan_out inference_mode": f"this option: {_NOT_YET}",
    "template chat_template conversation": "the model's own chat template is used; another one is "
    "data.chat.template: FILE",
    "push_to_hub hub_model_id hub_private_repo hub_strategy": "push the result: peftkit export RUN --to hub "
    "--repo OWNER/NAME",
    "load_in_8bit": "8-bit bases are not trained: method.name: qlora trains over 4 bit",
    "resume_from_checkpoint": "peftkit resume RUN",
    "num_return_sequences temperature top_p top_k do_sample": "answers are generated greedily: leave it out",
    "special_tokens tokens added_tokens new_special_tokens add_tokens add_special_tokens": "method.also_train: "
    "[{new_tokens: [...]}] adds tokens and trains their rows, {tokens: [...]} trains those of tokens that there are",
}


def _show(value: object) -> str:
    try:
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    except yaml.YAMLError:  # from Python anything may come
        return str(value)


_KEYS: dict[str, Translation] = {
    **{name: by_value(key, {}, is_name=False) for key, names in _SAME.items() for name in names.split()},
    **_TRANSLATIONS,
}
_INSTEAD = {name: text for names, text in _WITHOUT_KEY.items() for name in names.split()}


def translate_key(key: str, value: object, siblings: Mapping[str, object]) -> tuple[str, str]:
    """Return (peftkit's key with the value in its terms, what to do instead); both empty for an unknown key.

    Example: lora_r, 16 -> "method.rank: 16". `siblings` are the keys beside it, for values that need two.
    """
    name = key.lower().removeprefix("--").replace("-", "_")
    if name in _KEYS and value is None:
        return "", "leave it out: null is no setting"
    if name in _KEYS:
        text = _KEYS[name](value, siblings)
        return (text, "") if " " not in text.partition(":")[0] else ("", text)
    is_off = str(value).lower() in {"false", "none", "no", "off"}
    return "", "leave it out" if name in _INSTEAD and is_off else _INSTEAD.get(name, "")
