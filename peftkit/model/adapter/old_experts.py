"""LoRA of single experts, as PEFT wrote it before transformers 5 fused experts: rewritten once, as PEFT reads it.

Qwen-MoE and Mixtral adapters of that time have names such as `experts.3.w1.lora_A`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.edits import lora_rank_and_scale
from peftkit.model.adapter.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config, read_shapes
from peftkit.model.base.converted import converted_once
from peftkit.model.base.identity import IDENTITY_FILE
from peftkit.rundir import MANIFEST, sha256_of, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_CONVERSION_VERSION = "1"  # raise when what is written changes
_OLD_NAME = re.compile(r"^(.*\.layers\.\d+\.).*\.experts\.(\d+)\.(\w+)\.lora_([AB])\.weight$")
_FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


def has_single_experts(folder: Path) -> bool:
    """Return whether an adapter's file has LoRA factors of single experts. Raises UserError for a damaged file."""
    return any(_OLD_NAME.match(name) for name in read_shapes(folder))


def with_fused_experts(folder: Path, model: PreTrainedModel) -> Path:
    """Return the cached folder of an adapter of single experts, rewritten for the fused experts of `model`.

    `model` is on the meta device, and gets wrapped. Raises UserError where the two do not fit together.
    """
    import peft

    files = [folder / name for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, IDENTITY_FILE) if (folder / name).is_file()]
    shapes = str([(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()])
    key = "".join([*map(sha256_of, files), shapes, peft.__version__, _CONVERSION_VERSION])
    digest = hashlib.sha256(key.encode()).hexdigest()
    place = f"adapters/{folder.name[:64]}-{digest[:16]}"
    return converted_once(place, lambda out: _write_fused(folder, model, out), source=folder.name, source_sha256=digest)


def _write_fused(folder: Path, model: PreTrainedModel, out: Path) -> None:
    """Write an adapter of single experts as one of fused experts. Raises UserError where it does not fit."""
    import peft
    import torch
    from safetensors.torch import load_file, save_file

    described, old = read_adapter_config(folder), load_file(folder / ADAPTER_WEIGHTS)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        state = peft.get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        fused = {name: tensor.contiguous() for name, tensor in _fused_tensors(peft_model, old, described)}
    except (ValueError, KeyError, RuntimeError) as error:
        got = f"LoRA of single experts that PEFT cannot fuse ({error})"
        raise UserError(Problem(str(folder), got, "each projection of every expert, at one rank")) from error
    tensors = {name: tensor for name, tensor in old.items() if not _OLD_NAME.match(name)} | fused
    wrong = sorted(tensors.keys() ^ state.keys())
    wrong += [name for name in sorted(tensors.keys() & state.keys()) if tensors[name].shape != state[name].shape]
    if wrong:
        raise UserError(Problem(str(folder), f"{wrong[0]}, which has no counterpart", "an adapter of this base"))
    for file in folder.iterdir():
        if file.is_file() and file.name not in {ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST}:
            shutil.copyfile(file, out / file.name)
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    peft_model.peft_config["default"].save_pretrained(str(out))
    known = read_adapter_config(out)
    write_json(out / ADAPTER_CONFIG, {**described, **known})  # what PEFT ignores is told later


def _fused_tensors(
    peft_model: Any, old: Mapping[str, torch.Tensor], described: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the factors of fused experts, in the order in which PEFT unpacks them.

    With E experts of rank r: A is (E r, d_in), expert by expert; B is (d_out, r E), rank by rank. Of two
    projections that are fused, A is stacked, and B is block diagonal: (W1; W2) + (B1 A1; B2 A2). Each B is scaled by
    what its projection's alpha and rank say over what PEFT takes for the fused ones, which differs with rsLoRA
    or patterns.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    factors: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    modules: dict[tuple[str, str], str] = {}  # one of each projection: patterns name projections, not experts
    for name, tensor in old.items():
        if match := _OLD_NAME.match(name):
            layer, expert, projection, factor = match.groups()
            factors.setdefault((layer, projection, factor), {})[int(expert)] = tensor
            modules[layer, projection] = name.removeprefix("base_model.model.").partition(".lora_")[0]
    for name, module in peft_model.named_modules():
        parameter = getattr(module, "parameter_name", None)
        if not isinstance(module, LoraLayer) or parameter not in _FUSED:
            continue
        layer = re.sub(r"(\.layers\.\d+\.).*", r"\1", name)
        projections = next((p for p in _FUSED[parameter] if (layer, p[0], "A") in factors), ())
        num_experts = len(getattr(module.get_base_layer(), parameter))
        experts = range(num_experts)
        parts = {f: [factors[layer, projection, f] for projection in projections] for f in "AB"}
        for projection, part in zip(projections, parts["B"], strict=True):
            scale = lora_rank_and_scale(described, modules[layer, projection])[1] / float(module.scaling["default"])
            part.update({expert: tensor * scale for expert, tensor in part.items() if scale != 1})
        a = torch.stack([torch.cat([part[e] for part in parts["A"]]) for e in experts])
        block_diag: Any = torch.block_diag  # without types
        b = torch.stack([block_diag(*(part[e] for part in parts["B"])) for e in experts])
        yield f"{name}.lora_A.weight", a.flatten(0, 1)
        yield f"{name}.lora_B.weight", b.permute(2, 0, 1).flatten(0, 1).T
