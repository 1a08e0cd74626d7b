"""The changes that an adapter makes to each parameter of its base, read from PEFT's own layers.

The base is on the meta device, so that no weights are loaded. PEFT decides which tensor of the adapter's file
applies where, with which scale and orientation; `ship` does the arithmetic, file by file.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftkit.errors import Problem, UserError, first_line
from peftkit.methods.lora import BASE_CHANGING_INITS
from peftkit.model.adapter.load import ADAPTER_CONFIG, read_adapter_config
from peftkit.model.adapter.names import fitting_renames, rename_fix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EditKind = Literal["whole", "lora", "dora", "vera", "embedding", "experts", "shift", "scale", "rows"]
_PEFT_PREFIX = "base_model.model."
_BASE_CHANGING_INITS = (*BASE_CHANGING_INITS, "corda", "loftq", "lora_ga")
_UNSUPPORTED_KEYS = (
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_PROMPT_METHODS = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT"}
_MERGEABLE = ("LORA", "ADALORA", "VERA", "IA3", "LN_TUNING")


@dataclass(frozen=True)
class Edit:
    """One change of one parameter W. `tensors` maps the part in the formula to the adapter's tensor name.

    whole: W becomes "value".
    lora: W + s B A with "B" (d_out, rank) and "A" (rank, d_in); AdaLoRA has singular values "E" between them
      (Zhang et al. 2023, equation 3).
    vera: W + b (B A d) with vectors "b" and "d" and the first rows and columns of shared "B" and "A"
      (Kopiczko et al. 2024, equation 2).
    dora: m (W + s B A) / |W + s B A| by rows of d_out, with m "magnitude" (Liu et al. 2024, equation 5).
    embedding: W + s (B A)^T. experts: W[e] + s B[e] A[e]. shift: a bias plus s "value". scale: W times
    "value" along its outputs, or its inputs with `scales_inputs`. rows: W[ids] becomes "value". `transposed`
    where W is (d_in, d_out). `is_table_copy` marks the base's own embedding, which PEFT saves beside an
    adapter of it.
    """

    kind: EditKind
    tensors: Mapping[str, str]
    scale: float = 1.0
    transposed: bool = False
    scales_inputs: bool = False  # scale
    ids: tuple[int, ...] = field(default=(), repr=False)
    is_table_copy: bool = False

    @property
    def is_additive(self) -> bool:
        """Whether W gets a summand that does not depend on W."""
        return self.kind in {"lora", "vera", "embedding", "experts", "shift"}


Edits = Mapping[str, tuple[Edit, ...]]  # by the parameter's name in the base, in the order of application


def refuse_unmergeable(folder: Path, config: Mapping[str, object]) -> None:
    """Raise UserError, with all problems at once, for adapters that cannot be merged."""
    where, kind = str(folder / ADAPTER_CONFIG), str(config.get("peft_type"))
    problems = []
    if kind in _PROMPT_METHODS:
        got = f"{kind}, whose virtual tokens are not part of the weights: there is nothing to merge"
        fix = "use it with PEFT as it is, or train the same data with method lora"
        problems.append(Problem(f"{where} peft_type", got, ", ".join(_MERGEABLE), fix))
    elif kind not in _MERGEABLE:
        got, fix = f"{kind}, which peftkit does not merge", "try PEFT's merge_and_unload"
        problems.append(Problem(f"{where} peft_type", got, ", ".join(_MERGEABLE), fix))
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        got = f"{init}, which changed the base that it was trained on"
        fix = "save it with path_initial_model_for_weight_conversion (PEFT), which makes it a plain LoRA"
        problems.append(Problem(f"{where} init_lora_weights", got, "an adapter of the unchanged base", fix))
    for key in _UNSUPPORTED_KEYS:
        if config.get(key):
            problems.append(Problem(f"{where} {key}", "set", "not set", "peftkit does not merge this kind"))
    if problems:
        raise UserError(problems)


def read_edits(
    model: PreTrainedModel, folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Edit, ...]]:
    """Return the edits of an adapter folder by parameter of `model`, a meta-device base (it gets wrapped).

    `shapes` are those of the tensors in the adapter's file. Raises UserError where one of them is unused, or
    a module needs one that is missing: a merge that leaves something out is wrong.
    """
    from peft import get_peft_model_state_dict

    refuse_unmergeable(folder, read_adapter_config(folder))
    parameters = set(model.state_dict())
    edits_by_parameter: dict[str, list[Edit]] = {}
    used_tensors: set[str] = set()
    peft_model = _peft_model_of(model, folder)
    if peft_model.peft_config["default"].peft_type != "ADALORA":  # its file holds the ranks that are left
        expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        problems = [
            Problem(
                f"{folder} {name}",
                f"shape {shapes[name]}",
                f"{tuple(tensor.shape)}",
                "check that this base and adapter_config.json belong to the weights",
            )
            for name, tensor in expected.items()
            if name in shapes and tuple(tensor.shape) != shapes[name]
        ]
        if problems:
            raise UserError(problems[:5])
    for parameter, edit in _layer_edits(peft_model, shapes):
        edits_by_parameter.setdefault(parameter, []).append(edit)
        used_tensors.update(edit.tensors.values())
    # of tied ends PEFT may save both
    tied = [name for name, module in peft_model.named_modules() if getattr(module, "tied_adapter", None) is not None]
    used_tensors |= {name for name in shapes if any(name.startswith(f"{tied_name}.") for tied_name in tied)}
    # beside a table that was resized and trained whole, PEFT saves the untrained one, and the trained one twice
    copies = re.compile(r"\.(original_module|modules_to_save)\.")
    used_tensors |= {name for name in shapes if copies.sub(".", name) in shapes.keys() - {name}}
    for name in sorted(shapes.keys() - used_tensors):
        parameter = _base_name(name)
        if parameter in parameters:  # trained whole, or a copy of an embedding that PEFT saved beside it
            edit = Edit("whole", {"value": name}, is_table_copy=name.endswith(".base_layer.weight"))
            edits_by_parameter.setdefault(parameter, []).insert(0, edit)
            used_tensors.add(name)
    faults = [("without a module in this base", tensor_name) for tensor_name in sorted(shapes.keys() - used_tensors)]
    faults += [("which is not in the file", tensor_name) for tensor_name in sorted(used_tensors - shapes.keys())]
    if faults:
        expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        fix = rename_fix(folder, fitting_renames(shapes, expected))
        raise UserError(
            Problem(str(folder), f"{name}, {fault}", "each tensor used once, none left out", fix)
            for fault, name in (faults[:1] if fix else faults[:5])
        )
    return {parameter: tuple(edits) for parameter, edits in edits_by_parameter.items()}


def _peft_model_of(model: PreTrainedModel, folder: Path) -> Any:
    """Wrap the base in the adapter's PEFT model on the meta device.

    Raises UserError where it does not fit.
    """
    import peft
    import torch

    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if isinstance(config, peft.LoraConfig):
            config.init_lora_weights = True  # how it started does not matter any more, and may look at weights
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except Exception as error:
        # a configuration that is damaged fails in any part of PEFT: with the type that the part raises
        got = f"an adapter that does not fit this base ({first_line(error)})"
        raise UserError(Problem(str(folder), got, "an adapter of this base")) from error


def _base_name(name: str) -> str:
    """Return the base's name of a module or tensor of the PEFT model."""
    inner_name = name.removeprefix(_PEFT_PREFIX).replace(".ln_tuning_layers", "")
    return inner_name.replace(".base_layer", "").replace(".modules_to_save", "").replace(".token_adapter", "")


def _layer_edits(peft_model: Any, tensor_names: Collection[str]) -> Iterator[tuple[str, Edit]]:
    """Yield (parameter, edit) of all adapted layers, in model order."""
    from peft.tuners.adalora import AdaLoraLayer
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.vera import VeraLayer

    for name, module in peft_model.named_modules():
        if isinstance(module, TrainableTokensLayer):
            owner = module.tied_adapter or module
            owner_name = next(
                module_name for module_name, candidate in peft_model.named_modules() if candidate is owner
            )
            ids = tuple(int(i) for i in owner.token_indices["default"])
            value = {"value": f"{owner_name}.trainable_tokens_delta"}
            copy = {"value": f"{owner_name}.base_layer.weight"}  # saved where the vocabulary was resized
            if copy["value"] in tensor_names:
                yield f"{_base_name(name)}.weight", Edit("whole", copy, is_table_copy=True)
            yield f"{_base_name(name)}.weight", Edit("rows", value, ids=ids)
        elif isinstance(module, IA3Layer):
            # IA3 (Liu et al. 2022) scales outputs and their bias, or the inputs of a feed-forward layer
            scales, base_name = {"value": f"{name}.ia3_l"}, _base_name(name)
            of_inputs = bool(module.is_feedforward)
            edit = Edit("scale", scales, transposed=bool(module.fan_in_fan_out), scales_inputs=of_inputs)
            yield f"{base_name}.weight", edit
            if not of_inputs and module.get_base_layer().bias is not None:
                yield f"{base_name}.bias", Edit("scale", scales)
        elif isinstance(module, VeraLayer):
            parts = {"b": f"{name}.vera_lambda_b", "d": f"{name}.vera_lambda_d"}
            parts |= {"A": "base_model.vera_A", "B": "base_model.vera_B"}
            yield f"{_base_name(name)}.weight", Edit("vera", parts, transposed=bool(module.fan_in_fan_out))
        elif isinstance(module, AdaLoraLayer):
            # PEFT divides by the rank that training began with, plus 1e-5, whatever rank is left
            scale = float(module.scaling["default"]) / (module.r["default"] + 1e-5)
            adalora_factors = {part: f"{name}.lora_{part}" for part in ("A", "B", "E")}
            adalora_edit = Edit("lora", adalora_factors, scale, transposed=bool(module.fan_in_fan_out))
            yield f"{_base_name(name)}.weight", adalora_edit
        elif isinstance(module, LoraLayer) and "default" in module.scaling:
            yield from _lora_edits(name, module, tensor_names)


def _lora_edits(name: str, module: Any, tensor_names: Collection[str]) -> Iterator[tuple[str, Edit]]:
    """Yield the edits of a LoRA layer: embedding, raw parameter, fused experts, or linear with its bias."""
    scale, base_name = float(module.scaling["default"]), _base_name(name)
    parameter = getattr(module, "parameter_name", None)
    if module.lora_embedding_A:
        pair = {"A": f"{name}.lora_embedding_A", "B": f"{name}.lora_embedding_B"}
        magnitude = f"{name}.lora_magnitude_vector"
        if magnitude in tensor_names:
            raise UserError(
                Problem(name, "DoRA of an embedding", "plain LoRA of the embedding", "only PEFT can apply this")
            )
        yield f"{base_name}.weight", Edit("embedding", pair, scale)
        return
    pair = {"A": f"{name}.lora_A.weight", "B": f"{name}.lora_B.weight"}
    if parameter is not None:
        owner = module.get_base_layer()
        is_stacked = getattr(owner, parameter).ndim == 3
        is_transposed = bool(getattr(owner, "is_transposed", False))  # W (expert, d_in, d_out)
        yield (
            f"{base_name}.{parameter}",
            Edit("experts" if is_stacked else "lora", pair, scale, transposed=is_stacked and is_transposed),
        )
        return
    transposed = bool(module.fan_in_fan_out)
    if module.lora_magnitude_vector:
        pair |= {"magnitude": f"{name}.lora_magnitude_vector"}
        yield f"{base_name}.weight", Edit("dora", pair, scale, transposed=transposed)
    else:
        yield f"{base_name}.weight", Edit("lora", pair, scale, transposed=transposed)
    if module.lora_bias["default"]:
        yield f"{base_name}.bias", Edit("shift", {"value": f"{name}.lora_B.bias"}, scale)


def lora_rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return (rank, scale of B @ A) of a module, from the content of adapter_config.json.

    The scale is alpha / rank, or alpha / sqrt(rank) with rsLoRA. `module` is the full name in the base,
    without PEFT's prefix. Where two patterns match, the first wins. PEFT sorts them when it saves: the file's
    order is that of every later load, and may differ from that of the training. Source:
    `LoraModel._create_and_replace`.
    {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4}}, "layers.0.q_proj" -> (4, 4.0)
    """
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = int(ranks.get(get_pattern_key(ranks.keys(), module), config["r"]))
    alpha = float(alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
