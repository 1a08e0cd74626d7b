"""What an adapter does to each parameter of its base, read off the layers that PEFT itself makes of it.

The base stands on the meta device: nothing is loaded. Which tensor of the adapter's file takes part where,
at which scale and which way round, is PEFT's to say; the arithmetic is done by `ship`, file by file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import Problem, UserError
from peftkit.methods.lora import CHANGES_BASE
from peftkit.model.adapter.load import CONFIG, read_adapter_config

Kind = Literal["whole", "lora", "dora", "vera", "embedding", "experts", "shift", "scale", "rows"]
_OUTER = "base_model.model."
_CHANGES_BASE = (*CHANGES_BASE, "corda", "loftq", "lora_ga")
_UNKNOWN = (
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_NOT_WEIGHTS = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT"}
_MERGES = ("LORA", "ADALORA", "VERA", "IA3", "LN_TUNING")


@dataclass(frozen=True)
class Edit:
    """One change of one parameter W. `tensors` gives the adapter's tensors by their part in it.

    whole: W becomes "value". lora: W + s B A, "B" (d_out, rank) and "A" (rank, d_in); AdaLoRA has singular
    values "E" between them (Zhang et al. 2023, equation 3). vera: W + b (B A d) with vectors "b" and "d", of
    shared "B" and "A" the first rows and columns (Kopiczko et al. 2024, equation 2). dora: m (W + s B A) /
    |W + s B A| by rows of d_out, with m "magnitude" (Liu et al. 2024, equation 5). embedding: W + s (B A)^T.
    experts: W[e] + s B[e] A[e]. shift: a bias plus s "value". scale: W times "value" along its outputs or
    inputs. rows: W[ids] becomes "value". `transposed` where W is (d_in, d_out). `copied` marks the base's own
    table, which PEFT saves beside an adapter of it.
    """

    kind: Kind
    tensors: Mapping[str, str]
    scale: float = 1.0
    transposed: bool = False
    of_inputs: bool = False  # scale
    ids: tuple[int, ...] = field(default=(), repr=False)
    copied: bool = False

    @property
    def adds(self) -> bool:
        """Whether it is a sum of W and something that does not depend on W."""
        return self.kind in {"lora", "vera", "embedding", "experts", "shift"}


Edits = Mapping[str, tuple[Edit, ...]]  # by the parameter's name in the base, in the order of application


def refuse_unmergeable(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError, all at once, for what is in no sense an addition to the base's weights."""
    where, kind = str(folder / CONFIG), str(config.get("peft_type"))
    problems = []
    if kind in _NOT_WEIGHTS:
        got = f"{kind}, whose learned tokens stand beside the weights: there is nothing to merge"
        fix = "use it with PEFT as it is, or train the same data with method lora"
        problems.append(Problem(f"{where} peft_type", got, ", ".join(_MERGES), fix))
    elif kind not in _MERGES:
        got, fix = f"{kind}, which peftkit does not merge", "PEFT's merge_and_unload may"
        problems.append(Problem(f"{where} peft_type", got, ", ".join(_MERGES), fix))
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        got = f"{start}, which changed the base that it was trained on"
        fix = "save it with path_initial_model_for_weight_conversion (PEFT), which makes it a plain LoRA"
        problems.append(Problem(f"{where} init_lora_weights", got, "an adapter of the base as it is", fix))
    for key in _UNKNOWN:
        if config.get(key):
            problems.append(Problem(f"{where} {key}", "set", "not set", "peftkit does not merge this kind"))
    if problems:
        raise UserError(problems)


def edits_of(model: Any, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Edit, ...]]:
    """The edits of an adapter's folder, by parameter of `model`, a base on the meta device (it is wrapped).

    `shapes` are those of the tensors in the adapter's file. Raises UserError where one of them is left
    without a use, or a module asks for one that is not there: a merge that leaves something out is wrong.
    """
    refuse_unmergeable(folder, read_adapter_config(folder))
    parameters = set(model.state_dict())
    found: dict[str, list[Edit]] = {}
    used: set[str] = set()
    wrapped = _wrapped(model, folder)
    _refuse_shapes(wrapped, folder, shapes)
    for parameter, edit in _layer_edits(wrapped, shapes):
        found.setdefault(parameter, []).append(edit)
        used.update(edit.tensors.values())
    for name in sorted(shapes.keys() - used):
        parameter = _plain(name)
        if parameter in parameters:  # trained whole, or a copy of an embedding that PEFT saved beside it
            edit = Edit("whole", {"value": name}, copied=name.endswith(".base_layer.weight"))
            found.setdefault(parameter, []).insert(0, edit)
            used.add(name)
    wrong = [("without a module in this base", n) for n in sorted(shapes.keys() - used)]
    wrong += [("which is not in the file", n) for n in sorted(used - shapes.keys())]
    if wrong:
        raise UserError(
            [
                Problem(str(folder), f"{name}, {what}", "each tensor used once, none left out")
                for what, name in wrong[:5]
            ]
        )
    return {parameter: tuple(edits) for parameter, edits in found.items()}


def _wrapped(model: Any, folder: Path) -> Any:
    """PEFT's model of the adapter, with shapes alone."""
    import peft
    import torch

    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if isinstance(config, peft.LoraConfig):
            config.init_lora_weights = (
                True  # how it started does not matter any more, and may look at weights
            )
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except Exception as error:
        # a configuration that is damaged fails in any part of PEFT: with the type that the part raises
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        got = f"an adapter that does not go onto this base ({said})"
        raise UserError(Problem(str(folder), got, "an adapter of this base")) from error


def _refuse_shapes(wrapped: Any, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where tensors are not of the sizes that configuration and base ask for."""
    from peft import get_peft_model_state_dict

    if wrapped.peft_config["default"].peft_type == "ADALORA":
        return  # its file holds the ranks that are left
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    wrong = [
        Problem(
            f"{folder} {name}",
            f"shape {shapes[name]}",
            f"{tuple(tensor.shape)}",
            "is this its base, and its configuration?",
        )
        for name, tensor in expected.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    if wrong:
        raise UserError(wrong[:5])


def _plain(name: str) -> str:
    """A module's or a tensor's name as the base has it."""
    kept = name.removeprefix(_OUTER).replace(".ln_tuning_layers", "")
    return kept.replace(".base_layer", "").replace(".modules_to_save", "")


def _layer_edits(wrapped: Any, names: Collection[str]) -> Iterator[tuple[str, Edit]]:
    """(parameter, edit) of all adapted layers, in the order of the model."""
    from peft.tuners.adalora import AdaLoraLayer
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.vera import VeraLayer

    for name, module in wrapped.named_modules():
        if isinstance(module, TrainableTokensLayer):
            owner = module.tied_adapter or module
            stands = next(n for n, m in wrapped.named_modules() if m is owner)
            ids = tuple(int(i) for i in owner.token_indices["default"])
            value = {"value": f"{stands}.trainable_tokens_delta"}
            yield f"{_plain(name).removesuffix('.token_adapter')}.weight", Edit("rows", value, ids=ids)
        elif isinstance(module, IA3Layer):
            yield from _ia3_edits(name, module)
        elif isinstance(module, VeraLayer):
            parts = {"b": f"{name}.vera_lambda_b", "d": f"{name}.vera_lambda_d"}
            parts |= {"A": "base_model.vera_A", "B": "base_model.vera_B"}
            yield f"{_plain(name)}.weight", Edit("vera", parts, transposed=bool(module.fan_in_fan_out))
        elif isinstance(module, AdaLoraLayer):
            yield f"{_plain(name)}.weight", _adalora_edit(name, module)
        elif isinstance(module, LoraLayer) and "default" in module.scaling:
            yield from _lora_edits(name, module, names)


def _ia3_edits(name: str, module: Any) -> Iterator[tuple[str, Edit]]:
    """Liu et al. 2022: outputs are scaled, their bias with them, or inputs of a feed-forward layer."""
    value, plain = {"value": f"{name}.ia3_l"}, _plain(name)
    inputs = bool(module.is_feedforward)
    edit = Edit("scale", value, transposed=bool(module.fan_in_fan_out), of_inputs=inputs)
    yield f"{plain}.weight", edit
    if not inputs and module.get_base_layer().bias is not None:
        yield f"{plain}.bias", Edit("scale", value)


def _adalora_edit(name: str, module: Any) -> Edit:
    """PEFT divides by the rank that training began with, plus 1e-5, whatever rank is left."""
    scale = float(module.scaling["default"]) / (module.r["default"] + 1e-5)
    parts = {part: f"{name}.lora_{part}" for part in ("A", "B", "E")}
    return Edit("lora", parts, scale, transposed=bool(module.fan_in_fan_out))


def _lora_edits(name: str, module: Any, names: Collection[str]) -> Iterator[tuple[str, Edit]]:
    scale, plain = float(module.scaling["default"]), _plain(name)
    parameter = getattr(module, "parameter_name", None)
    if module.lora_embedding_A:
        pair = {"A": f"{name}.lora_embedding_A", "B": f"{name}.lora_embedding_B"}
        magnitude = f"{name}.lora_magnitude_vector"
        if magnitude in names:
            raise UserError(Problem(name, "DoRA of an embedding", "LoRA there", "PEFT alone can apply this"))
        yield f"{plain}.weight", Edit("embedding", pair, scale)
        return
    pair = {"A": f"{name}.lora_A.weight", "B": f"{name}.lora_B.weight"}
    if parameter is not None:
        owner = module.get_base_layer()
        stacked = getattr(owner, parameter).ndim == 3
        outward = bool(getattr(owner, "is_transposed", False))  # W (expert, d_in, d_out)
        yield (
            f"{plain}.{parameter}",
            Edit("experts" if stacked else "lora", pair, scale, transposed=stacked and outward),
        )
        return
    transposed = bool(module.fan_in_fan_out)
    if module.lora_magnitude_vector:
        pair |= {"magnitude": f"{name}.lora_magnitude_vector"}
        yield f"{plain}.weight", Edit("dora", pair, scale, transposed=transposed)
    else:
        yield f"{plain}.weight", Edit("lora", pair, scale, transposed=transposed)
    if module.lora_bias["default"]:
        yield f"{plain}.bias", Edit("shift", {"value": f"{name}.lora_B.bias"}, scale)


def effective_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """(rank, what B @ A is multiplied by) of a module, from the content of adapter_config.json.

    `module` is its full name in the base, without PEFT's prefix. Where two patterns match, the first wins.
    PEFT sorts them when it saves: the file's order is that of every later load, and may be another than that
    of the training.
    Source: `LoraModel._create_and_replace`.
    """
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = int(ranks.get(get_pattern_key(ranks.keys(), module), config["r"]))
    alpha = float(alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
