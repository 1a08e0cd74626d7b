"""Model folder to export: the whole configuration, the needed tensors, and the files that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from peftkit.errors import Problem, UserError, first_line
from peftkit.model.base.file_checks import check_model_folder, read_json_file, shard_names
from peftkit.ship.export.gguf.families import FAMILIES, GgufFamily, gguf_family
from peftkit.ship.export.gguf.rope import GgufRope, gguf_rope
from peftkit.units import join_names

_INDEX_FILE = "model.safetensors.index.json"
_BUFFER_SUFFIXES = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # old files hold them; computed anew


@dataclass(frozen=True)
class GgufSource:
    """Model to export: `shapes` has every parameter that it needs; `aliases` other names of tied ones."""

    folder: Path
    config: Mapping[str, Any]
    family: GgufFamily
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    prefix: str  # of the model's body, which old files leave out

    @property
    def rope(self) -> GgufRope:
        """Return the rotary positions for the header."""
        return gguf_rope(self.config, self.family)


def convert_command(folder: Path) -> str:
    """Return the command that converts a model with llama.cpp's own script."""
    return f"from a checkout of llama.cpp: python convert_hf_to_gguf.py {folder} --outfile OUT --outtype f16"


def read_source(folder: Path) -> GgufSource:
    """Read the model of a folder. Raises UserError with all that llama.cpp would compute differently."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    where, fix = str(folder / "config.json"), convert_command(folder)
    if not (folder / "config.json").is_file():
        raise UserError(Problem(where, "no such file", "a model folder with config.json"))
    check_model_folder(folder)
    raw = read_json_file(folder, "config.json")
    family = gguf_family(str(raw.get("model_type")))
    if family is None:
        supported = ", ".join(name for row in FAMILIES for name in row.model_types)
        raise UserError(Problem(where, f"model_type {raw.get('model_type')}", f"one of {supported}", fix))
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError) as error:
        got = f"a configuration that transformers refuses ({first_line(error)})"
        raise UserError(Problem(where, got, f"the configuration of a {raw['model_type']}")) from error
    # the configuration with the values that a family computes where config.json gives none
    config = hf_config.to_dict()
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if hidden and heads:
        config["head_dim"] = config.get("head_dim") or hidden // heads
        config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    if "n_embd" in config:
        config["n_inner"] = config.get("n_inner") or 4 * config["n_embd"]
    if problems := [Problem(where, got, expected, fix) for got, expected in _unsupported_settings(config, raw, family)]:
        raise UserError(problems)
    name_by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    all_parameters = list(model.named_parameters(remove_duplicate=False))
    return GgufSource(
        folder,
        config,
        family,
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        {name: name_by_id[id(parameter)] for name, parameter in all_parameters if name_by_id[id(parameter)] != name},
        f"{model.base_model_prefix}.",
    )


def _unsupported_settings(
    config: Mapping[str, Any], raw: Mapping[str, Any], family: GgufFamily
) -> Iterator[tuple[str, str]]:
    """Yield (got, expected) for each setting that llama.cpp does not follow for this family."""
    if "quantization_config" in raw:
        yield "quantization_config", "unquantized weights"
    for key, values in family.only.items():
        if config.get(key) not in values:
            yield f"{key} {config.get(key)}", f"{key} {' or '.join(str(value) for value in values)}"
    yield from gguf_rope(config, family).problems
    if family.full_every:
        layer_types = config.get("layer_types") or []
        pattern = [
            "sliding_attention" if (i + 1) % family.full_every else "full_attention" for i in range(len(layer_types))
        ]
        if layer_types != pattern or config.get("sliding_window") is None:
            yield "other layer_types", f"every layer but each {family.full_every}th with a sliding window"
        wide = config["num_hidden_layers"] == family.wide_layers
        scalar = config["hidden_size"] / config["num_attention_heads"] if wide else config["head_dim"]
        if config.get("query_pre_attn_scalar") != scalar:
            yield f"query_pre_attn_scalar {config.get('query_pre_attn_scalar')}", f"{scalar:g}"
    if not family.can_untie_head and not config.get("tie_word_embeddings"):
        yield "an output matrix of its own (tie_word_embeddings false)", "the embedding as output matrix"


def dropped_window(source: GgufSource) -> int | None:
    """Return the sliding window that the model uses and llama.cpp drops, or None."""
    config = source.config
    window = config.get("use_sliding_window", True) and config.get("sliding_window")
    return int(window) if source.family.drops_window and window else None


def context_length(source: GgufSource) -> int:
    """Return the number of tokens up to which llama.cpp computes what transformers does."""
    trained_length = int(source.config[source.family.context])
    return min(trained_length, dropped_window(source) or trained_length)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `load` reads it and nothing else."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Any]


def stored_tensors(source: GgufSource) -> list[StoredTensor]:
    """Return the needed tensors in file order. Raises UserError where they are not the model's."""
    tensors: dict[str, StoredTensor] = {}
    unexpected = []
    for tensor in _tensors_in_files(source.folder):
        name = tensor.name
        if name not in source.shapes and source.prefix + name in source.shapes:
            name = source.prefix + name
        if name in source.shapes or name in source.aliases:
            tensors[name] = replace(tensor, name=name)
        elif not name.endswith(_BUFFER_SUFFIXES):
            unexpected.append(name)
    for alias, name in source.aliases.items():
        if alias in tensors and name not in tensors:  # of tied tensors a file may keep either
            tensors[name] = replace(tensors.pop(alias), name=name)
    problems = []
    where = str(source.folder)
    if unexpected:
        problems.append(Problem(where, f"other tensors: {join_names(unexpected, 3)}", "those of config.json's model"))
    if missing := [name for name in source.shapes if name not in tensors]:
        problems.append(Problem(where, f"no tensor {join_names(missing, 3)}", "all of the model's weights"))
    problems += [
        Problem(where, f"{name} of shape {item.shape}", f"{source.shapes[name]}, as config.json says")
        for name, item in tensors.items()
        if name in source.shapes and item.shape != source.shapes[name]
    ]
    if problems:
        raise UserError(problems)
    for alias, name in source.aliases.items():
        # transformers unties what a file holds twice with different numbers
        if alias in tensors and torch.equal(tensors[alias].load(), tensors[name].load()):
            del tensors[alias]
        elif alias in tensors and not source.family.can_untie_head:
            got = f"{alias} that differs from {name}"
            raise UserError(Problem(where, got, "the embedding as output matrix", convert_command(source.folder)))
    return list(tensors.values())


def _tensors_in_files(folder: Path) -> Iterator[StoredTensor]:
    """Yield every tensor of a folder. Raises UserError for missing or damaged files."""
    if (folder / _INDEX_FILE).is_file():
        names = shard_names(read_json_file(folder, _INDEX_FILE), folder / _INDEX_FILE, suffixes=(".safetensors",))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise UserError(Problem(str(folder), "no weights", "weights as *.safetensors"))
    for file in (folder / name for name in names):
        try:
            with safe_open(file, framework="pt") as weights:
                shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            got = f"a file that is not safetensors, or is damaged ({error})"
            fix = "download or write it again"
            raise UserError(Problem(str(file), got, "the model's weights", fix)) from None
        for name, shape in shapes.items():
            yield StoredTensor(name, shape, partial(_load_tensor, file, name))


def _load_tensor(file: Path, name: str) -> torch.Tensor:
    """Read one tensor. The file is opened anew for each: the pages of a mapping are let go with it."""
    with safe_open(file, framework="pt") as weights:
        return weights.get_tensor(name)
