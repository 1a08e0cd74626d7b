"""Loading of saved adapters, complete or refused.

PEFT warns of some missing tensors and is silent about unexpected ones.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError, safe_open

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.names import fitting_renames, rename_fix
from peftkit.model.base.file_checks import check_adapter_weights, check_model_folder
from peftkit.units import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_NAMES = 3
_SIZE_KEYS = ("r", "init_r", "num_virtual_tokens", "token_dim")  # of tensors that the adapter has itself


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read PEFT's configuration of an adapter folder.

    Raises UserError where it is not a JSON object of finite numbers.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(
            file.read_text(encoding="utf-8"), parse_constant=_reject_constant, parse_float=_parse_finite
        )
    except (OSError, ValueError, RecursionError) as error:
        got = f"text that is not JSON ({error})"
        raise UserError(Problem(str(file), got, "PEFT's configuration")) from None
    if not isinstance(config, dict):
        raise UserError(Problem(str(file), f"a {type(config).__name__}", "PEFT's configuration"))
    return config


def ignored_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys, with their values, that are switched on and that this PEFT does not know and ignores."""
    import peft

    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(str(config.get("peft_type")))
    fields = set(getattr(known, "__dataclass_fields__", config))
    return [f"{key}: {shorten(json.dumps(value))}" for key, value in config.items() if key not in fields and value]


def is_mlx_config(config: Mapping[str, Any]) -> bool:
    """Return whether an adapter_config.json is of Apple's mlx-lm."""
    return "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)


def refuse_unknown_type(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a type of adapter that PEFT does not have."""
    import peft

    if is_mlx_config(config):
        fix = f"peftkit convert {shlex.quote(str(Path(where).parent))} --out FIXED writes it as PEFT's"
        raise UserError(Problem(where, "an adapter of mlx-lm", "an adapter of PEFT", fix))
    kind, known = config.get("peft_type"), sorted(peft.PEFT_TYPE_TO_CONFIG_MAPPING)
    if kind not in known:
        got = f"peft_type {shorten(json.dumps(kind))}" if "peft_type" in config else "no peft_type"
        right = str(kind).upper().replace("-", "_")
        fix = f"write peft_type: {right}" if right in known else "write that of the adapter, or train it again"
        raise UserError(Problem(where, got, f"one of PEFT's: {', '.join(known)}", fix))


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")


def _parse_finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _reject_constant(text)


def load_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load a saved adapter onto the base, for inference.

    Raises UserError unless the file has exactly the adapter's tensors, each of its shape, finite, and present
    in the loaded model as saved.
    """
    import torch
    from peft import PeftModel

    check_model_folder(folder)
    check_adapter_weights(folder)
    shapes = read_shapes(folder)
    # PEFT would allocate sizes from the configuration beyond those in the file
    config = read_adapter_config(folder)
    largest = max((max(shape, default=1) for shape in shapes.values()), default=0)
    ranks = config.get("rank_pattern")
    sizes = {name: config.get(name) for name in _SIZE_KEYS}
    sizes |= {f"rank_pattern {name}": rank for name, rank in ranks.items()} if isinstance(ranks, dict) else {}
    problems = [
        Problem(
            f"{folder / ADAPTER_CONFIG} {name}",
            f"{value}",
            f"at most {largest}, the largest size in {ADAPTER_WEIGHTS}",
            "the two files belong to different adapters",
        )
        for name, value in sizes.items()
        if isinstance(value, int | float) and value > largest
    ]
    if problems:
        raise UserError(problems)
    rows = resized_vocabulary(model, shapes)
    if rows is not None:  # it was trained with more tokens, or fewer, and brings both tables
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        peft_model = PeftModel.from_pretrained(model, folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # a folder that is damaged fails in any part of PEFT: with the type that the part raises
        got = f"an adapter that does not load ({type(error).__name__}: {_first_lines(error)})"
        fix = "train or download it again"
        raise UserError(Problem(str(folder), got, "a complete adapter of this base", fix)) from error
    problems = list(_compare_with_file(peft_model, folder, shapes))
    if problems:
        raise UserError(problems)
    return peft_model


def load_weighted_adapters(
    model: PreTrainedModel, folders: Sequence[Path], weights: Sequence[float]
) -> PreTrainedModel:
    """Load several LoRA adapters onto the base, active at once, each times its weight, for inference.

    Raises UserError as `load_adapter` does.
    """
    from peft.tuners.lora import LoraLayer

    peft_model = load_adapter(model, folders[0])
    names = ["default"]
    for number, folder in enumerate(folders[1:]):
        names.append(f"adapter{number + 1}")
        peft_model.load_adapter(folder, adapter_name=names[-1])
    for name, weight in zip(names, weights, strict=True):
        peft_model.set_adapter(name)
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(weight)
    peft_model.base_model.set_adapter(names, inference_mode=True)
    return peft_model.eval()


def load_adapter_tensors(model: PreTrainedModel, folder: Path) -> None:
    """Copy a saved adapter's tensors into one that was attached by a plan.

    Raises UserError where names or shapes differ: the recipe then describes another adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    check_model_folder(folder)
    check_adapter_weights(folder)
    shapes = read_shapes(folder)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    mismatched = sorted(shapes.keys() ^ expected.keys()) or [
        name for name, tensor in expected.items() if tuple(tensor.shape) != shapes[name]
    ]
    if mismatched:
        got = f"an adapter with other tensors than the recipe's (for example {mismatched[0]})"
        fix = "use the recipe that it was trained with: method, rank and targets"
        raise UserError(Problem(str(folder), got, "the adapter that the recipe describes", fix))
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))


def resized_vocabulary(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of embedding rows in an adapter's file, where it differs from the model's; else None.

    PEFT saves both tables whole beside an adapter that was trained after `resize_token_embeddings`.
    """
    table = model.get_input_embeddings()
    table_name = next(name for name, module in model.named_modules() if module is table)
    for ending in ("weight", "base_layer.weight", "token_adapter.base_layer.weight"):
        shape = shapes.get(f"base_model.model.{table_name}.{ending}")
        if shape is not None and shape[0] != table.weight.shape[0]:
            return shape[0]
    return None


def _first_lines(error: Exception) -> str:
    """Return the first two lines of an error: torch names the tensor in one and the fault in the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or "no reason given"


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read name -> shape of all tensors in the file. Raises UserError for a file that is not safetensors."""
    file = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        got = f"a file that is not safetensors, or is damaged ({_first_lines(error)})"
        raise UserError(Problem(str(file), got, "the adapter's weights", "download or save it again")) from None


def _compare_with_file(peft_model: object, folder: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[Problem]:
    """Yield a problem for missing, unexpected, non-finite, and wrongly loaded tensors."""
    import torch
    from peft import get_peft_model_state_dict

    file = str(folder / ADAPTER_WEIGHTS)
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    # PEFT saves the embeddings beside an adapter that changed the vocabulary
    extra_names = shapes.keys() - expected.keys()
    from peft import get_peft_model_state_dict

    if not any("embed" in name or "head" in name or "wte" in name for name in extra_names):
        embedding_tensors = {}
    else:
        embedding_tensors = dict(get_peft_model_state_dict(peft_model, save_embedding_layers=True))
    targets = {**expected, **embedding_tensors}
    for relation, names in (
        ("without", sorted(expected.keys() - shapes.keys())),
        ("with unexpected tensors,", sorted(shapes.keys() - targets.keys())),
    ):
        if names:
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            got = f"a file {relation} {', '.join(names[:_MAX_NAMES])}{more}"
            fix = rename_fix(folder, fitting_renames(shapes, expected))
            yield Problem(file, got, "exactly the tensors that adapter_config.json describes", fix)
    with safe_open(file, framework="pt") as weights:
        for name in sorted(shapes.keys() & targets.keys()):
            tensor, target = weights.get_tensor(name), targets[name]
            if tensor.is_floating_point() != target.is_floating_point():
                yield Problem(file, f"{name} of {tensor.dtype}", f"a dtype like {target.dtype}")
            elif not bool(tensor.float().isfinite().all()):
                yield Problem(file, f"{name} with NaN or infinity", "finite weights", "train it again")
            elif tensor.shape != target.shape or not torch.equal(tensor.to(target.dtype), target.cpu()):
                yield Problem(file, f"{name}, which is loaded with other values", "the tensor as it was saved")
