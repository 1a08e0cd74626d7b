"""Checkpoints that are quantized already: converted once to a bfloat16 folder in the cache, complete or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from peftkit import interrupt
from peftkit.archs.held import HeldFormat, way_out
from peftkit.errors import Problem, UserError, first_line
from peftkit.hub import hub_is_reachable
from peftkit.model.base.converted import converted_once
from peftkit.model.base.file_checks import check_model_folder
from peftkit.model.base.identity import weight_files, weights_fingerprint
from peftkit.model.base.locate import LocatedBase
from peftkit.model.base.progress_bar import without_progress_bar
from peftkit.rundir import require_free_space, sha256_of

_CONVERSION_VERSION = 1  # raise when what is written changes, so that older conversions are not reused
_MAX_NAME = 64  # characters
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")  # tokenizer, template, generation


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without how its weights are quantized."""
    text_config = config.get("text_config")
    nested = {"text_config": plain_config(text_config)} if isinstance(text_config, Mapping) else {}
    return {k: v for k, v in config.items() if k not in {"quantization_config", "quantization"}} | nested


def dequantize_base(base: LocatedBase, held: HeldFormat, where: str) -> Path:
    """Return the cached bfloat16 folder of a quantized checkpoint, converting it first if needed.

    Keyed by the weights' fingerprint and all files beside them. Raises UserError for a format that transformers
    cannot undo, and where it cannot read the files.
    """
    if not held.undone_by:
        got = f"{base.id}, whose weights are held as {held.name}"
        raise UserError(Problem(where, got, "weights that are not quantized", way_out(base.id, held)))
    path = base.path or _download(base)
    check_model_folder(path)
    digest = weights_fingerprint(path)
    if digest is None:
        raise UserError(Problem(where, f"{base.id} without all of its weight files", "*.safetensors", "download it"))
    key = hashlib.sha256("".join([digest, *map(sha256_of, _files_beside_weights(path))]).encode()).hexdigest()
    place = f"bases/{Path(base.id).name[:_MAX_NAME]}-{key[:16]}-bf16-v{_CONVERSION_VERSION}"
    return converted_once(
        place, lambda folder: _convert_folder(path, folder, held, where), source=base.id, source_sha256=digest
    )


def _download(base: LocatedBase) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", *_BESIDE_WEIGHTS]
    offline = not hub_is_reachable()
    folder = snapshot_download(
        base.id,
        revision=base.revision,
        allow_patterns=patterns,
        ignore_patterns=["*/*"],  # such as original/, the same weights in another form
        local_files_only=offline,
    )
    return Path(folder)


def _files_beside_weights(path: Path) -> list[Path]:
    """Return configuration, tokenizer, template and generation settings, in order."""
    return sorted({file for pattern in _BESIDE_WEIGHTS for file in path.glob(pattern) if file.is_file()})


def _convert_folder(path: Path, folder: Path, held: HeldFormat, where: str) -> None:
    """Dequantize a checkpoint to bfloat16, and write its weights as an unquantized model's, and its tokenizer.

    `save_pretrained` of the dequantized model itself would name tensors as the quantized file does
    (weight_scale_inv, _blocks), or refuse; so the tensors are given to a model that never was quantized.
    """
    import torch
    import transformers

    config_of = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}
    quantization = config_of[held.undone_by](dequantize=True) if held.undone_by in config_of else None
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    fix = way_out(path.name, replace(held, undone_by=""))
    if "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING:
        got = f"{path.name}, held as {held.name}, with code of its own"
        raise UserError(Problem(where, got, "a model that transformers has", fix))
    _refuse_missing_scales(path, held, where, fix)
    own_class: Any = getattr(transformers, str(next(iter(config.get("architectures") or ()), "")), None)
    model_class = own_class if hasattr(own_class, "from_pretrained") else transformers.AutoModelForCausalLM
    try:
        with without_progress_bar():
            model, told = model_class.from_pretrained(
                path,
                dtype=torch.bfloat16,
                device_map={"": "cpu"},
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,  # not asked about either
                **({"quantization_config": quantization} if quantization is not None else {}),
            )
            if quantization is None:
                model = model.dequantize()
    except ImportError:
        got = f"weights held as {held.name} without the bitsandbytes package"
        raise UserError(Problem(where, got, "an installed bitsandbytes", "pip install 'peftkit[qlora]'")) from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        got = f"{path.name}, held as {held.name}, which transformers cannot read ({first_line(error)})"
        raise UserError(Problem(where, got, "a checkpoint that it can dequantize", fix)) from error
    if lacking := sorted({*told["missing_keys"], *(str(key[0]) for key in told["mismatched_keys"])}):
        got = f"{path.name} without {len(lacking)} tensors (for example {lacking[0]})"
        raise UserError(Problem(where, got, "all of the model's weights", "download it again"))
    interrupt.stop_if_requested("interrupted while dequantizing the base; nothing is left of it")
    state = model.state_dict()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    space = "free disk space, or set PEFTKIT_CACHE to a folder on another disk"
    require_free_space(folder, num_bytes, what="the dequantized base", fix=space)
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(plain_config(model.config.to_dict())))
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    with without_progress_bar():
        plain.save_pretrained(folder)
    for file in _files_beside_weights(path):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)  # generation_config.json too, as its author wrote it


def _refuse_missing_scales(path: Path, held: HeldFormat, where: str, fix: str) -> None:
    """Raise UserError for quantized tensors without their scales: transformers would take the codes for weights."""

    names, coded = set[str](), set[str]()
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                names.add(name)
                is_scale = name.endswith(("_scale", "_scale_inv", "_scales"))
                if tensors.get_slice(name).get_dtype().startswith("F8") and not is_scale:
                    coded.add(name)
    scales = {name: {f"{name}_scale_inv", f"{name}_scale"} for name in coded}
    scales |= {name: {f"{name.removesuffix('_blocks')}_scales"} for name in names if name.endswith("_blocks")}
    if lacking := sorted(name for name, either in scales.items() if not either & names):
        got = f"{path.name}, held as {held.name}, with {lacking[0]} and no scale of it"
        raise UserError(Problem(where, got, "a scale for each quantized tensor", f"download it again, or {fix}"))
