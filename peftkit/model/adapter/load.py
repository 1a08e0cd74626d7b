"""A saved adapter, loaded whole or refused: PEFT warns of some missing tensors, and of no strange ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from peftkit.errors import Problem, UserError
from peftkit.model.base.file_checks import check_adapter_weights, check_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHOWN = 3
_SIZES = ("r", "init_r", "num_virtual_tokens", "token_dim")  # of tensors that the adapter has itself


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter folder. Raises UserError where it is no JSON object."""
    file = folder / CONFIG
    try:
        config = json.loads(
            file.read_text(encoding="utf-8"), parse_constant=_refuse_number, parse_float=_finite
        )
    except (OSError, ValueError, RecursionError) as error:
        got = f"text that is not JSON ({error})"
        raise UserError(Problem(str(file), got, "PEFT's configuration")) from None
    if not isinstance(config, dict):
        raise UserError(Problem(str(file), f"a {type(config).__name__}", "PEFT's configuration"))
    return config


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def load_adapter(model: Any, folder: Path) -> Any:
    """The base with a saved adapter, for inference.

    Raises UserError unless all tensors of the adapter are in the file and nothing else is, each of its shape,
    finite, and found in the model as it was saved.
    """
    import torch
    from peft import PeftModel

    check_folder(folder)
    check_adapter_weights(folder)
    shapes = _shapes(folder)
    _refuse_sizes(folder, shapes)
    rows = vocabulary_of(model, shapes)
    if rows is not None:  # it was trained with more tokens, or fewer, and brings both tables
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        loaded = PeftModel.from_pretrained(model, folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # a folder that is damaged fails in any part of PEFT: with the type that the part raises
        got = f"an adapter that does not load ({type(error).__name__}: {_said(error)})"
        fix = "train it again, or fetch it again"
        raise UserError(Problem(str(folder), got, "an adapter of this base, whole", fix)) from error
    problems = list(_unlike(loaded, folder, shapes))
    if problems:
        raise UserError(problems)
    return loaded


def load_weighted(model: Any, folders: Sequence[Path], weights: Sequence[float]) -> Any:
    """The base with several LoRA adapters that act at once, each times its weight, for inference.

    Raises UserError as `load_adapter` does.
    """
    from peft.tuners.lora import LoraLayer

    loaded = load_adapter(model, folders[0])
    names = ["default"]
    for number, folder in enumerate(folders[1:]):
        names.append(f"adapter{number + 1}")
        loaded.load_adapter(folder, adapter_name=names[-1])
    for name, weight in zip(names, weights, strict=True):
        loaded.set_adapter(name)
        for module in loaded.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(weight)
    loaded.base_model.set_adapter(names, inference_mode=True)
    return loaded.eval()


def load_into(model: Any, folder: Path) -> None:
    """Put a saved adapter's tensors into one that was attached by a plan.

    Raises UserError where the plan's adapter is another: the tensors have to be the same, each of its shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    check_folder(folder)
    check_adapter_weights(folder)
    shapes = _shapes(folder)
    needed = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(shapes.keys() ^ needed.keys()) or [
        name for name, tensor in needed.items() if tuple(tensor.shape) != shapes[name]
    ]
    if odd:
        got = f"an adapter with other tensors than the recipe's (for example {odd[0]})"
        fix = "give the recipe that it was trained by: method, rank and targets"
        raise UserError(Problem(str(folder), got, "the adapter that the recipe describes", fix))
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))


def vocabulary_of(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many rows the tables have that an adapter brings, where that is not what the model has.

    PEFT saves both tables whole beside an adapter that was trained after `resize_token_embeddings`.
    """
    table = model.get_input_embeddings()
    stands = next(name for name, module in model.named_modules() if module is table)
    for ending in ("weight", "base_layer.weight"):
        shape = shapes.get(f"base_model.model.{stands}.{ending}")
        if shape is not None and shape[0] != table.weight.shape[0]:
            return shape[0]
    return None


def _said(error: Exception) -> str:
    """The first two lines: torch names what it loads in one, and what is wrong with it in the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or "no reason given"


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors in the file. Raises UserError for a file that is not safetensors."""
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as found:
            return {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        got = f"a file that is not safetensors, or is damaged ({_said(error)})"
        raise UserError(Problem(str(file), got, "the adapter's weights", "fetch or write it again")) from None


def _refuse_sizes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError for sizes in the configuration beyond those in the file: PEFT would allocate them."""
    config = read_adapter_config(folder)
    largest = max((max(shape, default=1) for shape in shapes.values()), default=0)
    ranks = config.get("rank_pattern")
    given = {name: config.get(name) for name in _SIZES}
    given |= {f"rank_pattern {name}": rank for name, rank in ranks.items()} if isinstance(ranks, dict) else {}
    problems = [
        Problem(
            f"{folder / CONFIG} {name}",
            f"{value}",
            f"at most {largest}, the largest size in {WEIGHTS}",
            "the two are not of one adapter",
        )
        for name, value in given.items()
        if isinstance(value, int | float) and value > largest
    ]
    if problems:
        raise UserError(problems)


def _unlike(loaded: Any, folder: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[Problem]:
    """What the file lacks, what of it found no place, what is not finite, and what is not as it was saved."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    file = str(folder / WEIGHTS)
    needed = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    places = {**needed, **_tables(loaded, shapes.keys() - needed.keys())}
    for what, names in (
        ("without", sorted(needed.keys() - shapes.keys())),
        ("with other tensors,", sorted(shapes.keys() - places.keys())),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            got = f"a file {what} {', '.join(names[:_SHOWN])}{more}"
            yield Problem(file, got, "the tensors that adapter_config.json speaks of, and no others")
    with safe_open(file, framework="pt") as saved:
        for name in sorted(shapes.keys() & places.keys()):
            tensor, place = saved.get_tensor(name), places[name]
            if tensor.is_floating_point() != place.is_floating_point():
                yield Problem(file, f"{name} of {tensor.dtype}", f"numbers like {place.dtype}")
            elif not bool(tensor.float().isfinite().all()):
                yield Problem(file, f"{name} with NaN or infinity", "finite weights", "train it again")
            elif tensor.shape != place.shape or not torch.equal(tensor.to(place.dtype), place.cpu()):
                yield Problem(
                    file, f"{name}, which is loaded as something else", "the tensor as it was saved"
                )


def _tables(loaded: Any, others: set[str]) -> dict[str, Any]:
    """The embeddings among other tensors: PEFT saves them beside an adapter that changed the vocabulary."""
    from peft import get_peft_model_state_dict

    if not any("embed" in name or "head" in name or "wte" in name for name in others):
        return {}
    return dict(get_peft_model_state_dict(loaded, save_embedding_layers=True))
