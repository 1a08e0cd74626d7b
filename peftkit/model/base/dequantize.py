"""Checkpoints that are quantized already: converted once to a bfloat16 folder in the cache, complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.archs.held import HeldFormat, way_out
from peftkit.errors import Problem, UserError, first_line
from peftkit.hub import cache_folder, hub_is_reachable
from peftkit.model.base.file_checks import check_model_folder
from peftkit.model.base.identity import weights_fingerprint
from peftkit.model.base.locate import LocatedBase
from peftkit.rundir import publish_folder, require_free_space, verify_folder

_CONVERSION_VERSION = 1  # raise when what is written changes, so that older conversions are not reused
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")  # tokenizer, template, generation


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without how its weights are quantized."""
    text_config = config.get("text_config")
    nested = {"text_config": plain_config(text_config)} if isinstance(text_config, Mapping) else {}
    return {k: v for k, v in config.items() if k not in {"quantization_config", "quantization"}} | nested


def dequantize_base(base: LocatedBase, held: HeldFormat, where: str) -> Path:
    """Return the cached bfloat16 folder of a quantized checkpoint, converting it first if needed.

    Keyed by the weights' fingerprint. Raises UserError for a format that transformers cannot undo, and where it
    cannot read the files.
    """
    if not held.undone_by:
        got = f"{base.id}, whose weights are held as {held.name}"
        raise UserError(Problem(where, got, "weights that are not quantized", way_out(base.id, held)))
    path = base.path or _download(base)
    check_model_folder(path)
    digest = weights_fingerprint(path)
    if digest is None:
        raise UserError(Problem(where, f"{base.id} without all of its weight files", "*.safetensors", "download it"))
    folder = cache_folder() / "bases" / f"{Path(base.id).name}-{digest[:16]}-bf16-v{_CONVERSION_VERSION}"
    faults = verify_folder(folder, hashes=False)
    if not faults:
        return folder
    if folder.exists():
        fix = "remove this folder; the checkpoint is then dequantized again"
        raise UserError(Problem(str(folder), "; ".join(faults), "a complete conversion", fix))
    try:
        with publish_folder(folder, source=base.id, source_sha256=digest) as staging:
            _convert_folder(path, staging, held, where)
            interrupt.stop_if_requested("interrupted while dequantizing the base; nothing is left of it")
    except OSError:
        if verify_folder(folder, hashes=False):
            raise
        # another process was faster: its conversion of the same bytes is as good
    return folder


def _download(base: LocatedBase) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", *_BESIDE_WEIGHTS]
    offline = not hub_is_reachable()
    return Path(snapshot_download(base.id, revision=base.revision, allow_patterns=patterns, local_files_only=offline))


def _convert_folder(path: Path, folder: Path, held: HeldFormat, where: str) -> None:
    """Dequantize a checkpoint to bfloat16, and write its weights as an unquantized model's, and its tokenizer.

    `save_pretrained` of the dequantized model itself would name tensors as the quantized file does
    (weight_scale_inv, _blocks), or refuse; so the tensors are given to a model that never was quantized.
    """
    import torch
    import transformers

    config_of = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}
    quantization = config_of[held.undone_by](dequantize=True) if held.undone_by in config_of else None
    try:
        with without_progress_bar():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.bfloat16,
                device_map={"": "cpu"},
                use_safetensors=True,
                **({"quantization_config": quantization} if quantization is not None else {}),
            )
            if quantization is None:
                model = model.dequantize()
    except ImportError:
        got = f"weights held as {held.name} without the bitsandbytes package"
        raise UserError(Problem(where, got, "an installed bitsandbytes", "pip install 'peftkit[qlora]'")) from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        got = f"{path.name}, held as {held.name}, which transformers cannot read ({first_line(error)})"
        raise UserError(Problem(where, got, "a checkpoint that it can dequantize", way_out(path.name, held))) from error
    interrupt.stop_if_requested("interrupted while dequantizing the base; nothing is left of it")
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    fix = "free disk space, or set PEFTKIT_CACHE to a folder on another disk"
    require_free_space(folder, num_bytes, what="the dequantized base", fix=fix)
    config = type(model.config).from_dict(plain_config(model.config.to_dict()))
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    for file in (file for pattern in _BESIDE_WEIGHTS for file in path.glob(pattern)):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    with without_progress_bar():
        plain.save_pretrained(folder)


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Hide transformers' bar over the weights: progress is told by events."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
