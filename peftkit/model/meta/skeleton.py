"""A base without its weights: names and shapes of its parameters, which are tied, which go into 4-bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.model.base.file_checks import how_to_convert, pickled_weights
from peftkit.model.base.identity import folder_of, weight_files
from peftkit.model.base.remote_code import check_code
from peftkit.model.meta.layout import Place, places, ties
from peftkit.plan.plan import BasePlan

_FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")


def weights_folder(source: str, plan: BasePlan) -> Path:
    """The folder of a base's weights, fetched from the hub where they are not there yet.

    Raises UserError where they are pickled only, or cannot be fetched.
    """
    folder = folder_of(source, plan.revision)
    if folder is None or not (weight_files(folder) or Path(source).is_dir()):
        folder = _fetched(source, plan)
    if not weight_files(folder):
        found = pickled_weights(folder)
        got = f"{found[0]} only" if found else "no weights, or not all that its index names"
        fix = how_to_convert(folder) if found else ""
        raise UserError(Problem(f"base {plan.id}", got, "weights as safetensors", fix))
    return folder


def _fetched(source: str, plan: BasePlan) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(source, revision=plan.revision, allow_patterns=list(_FETCHED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        got = f"weights that cannot be fetched ({str(error).strip().splitlines()[0][:200]})"
        fix = "the hub must be reachable and the model's licence accepted, or give a folder"
        raise UserError(Problem(f"base {plan.id}", got, "a base that is there", fix)) from None
    return Path(found)


@dataclass(frozen=True)
class Skeleton:
    """`shapes` by parameter; `in_4bit` as `quantize.layers_in_4bit`; `ties` as `layout.ties`.

    `config` is what config.json has to say: the base's own, with what training changed in it.
    """

    places: Mapping[str, Place]  # by the name in the base's files
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, tuple[str, ...]]
    in_4bit: Mapping[str, bool]
    tables: frozenset[str]  # the embeddings and all that is tied to them
    config: Mapping[str, Any]


def blank(source: str, plan: BasePlan, *, vocabulary: int | None = None) -> Any:
    """The base on the meta device, without 4-bit layers; `vocabulary` where its tables were resized."""
    from transformers import AutoConfig

    from peftkit.model.meta.blank import blank_model

    check_code(source, plan)
    config = AutoConfig.from_pretrained(
        source, revision=plan.revision, trust_remote_code=plan.trust_remote_code
    )
    model = blank_model(replace(plan, quant_type=None), config, device="meta")
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def skeleton(
    source: str, plan: BasePlan, folder: Path, names: Iterable[str], *, vocabulary: int | None = None
) -> Skeleton:
    """What merging needs to know of a base; `names` are those of the tensors in its files."""
    from peftkit.model.quantize import layers_in_4bit, mended_loading

    with mended_loading(plan):
        model = blank(source, plan, vocabulary=vocabulary)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied, found, config = ties(model), places(model, names), _config_of(model, source, plan, folder)
        table = model.get_input_embeddings().weight
        tables = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is table}
        in_4bit = layers_in_4bit(model, plan)
    return Skeleton(found, shapes, tied, in_4bit, frozenset(tables), config)


def _config_of(model: Any, source: str, plan: BasePlan, folder: Path) -> dict[str, Any]:
    """The base's config.json, with what differs in the model that was trained: head, labels, positions."""
    from transformers import AutoConfig

    raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain = AutoConfig.from_pretrained(
        source, revision=plan.revision, trust_remote_code=plan.trust_remote_code
    )
    now = json.loads(model.config.to_json_string(use_diff=False))
    known = json.loads(plain.to_json_string(use_diff=False))
    changed = {key: value for key, value in now.items() if value != known.get(key)}
    kept = {key: value for key, value in changed.items() if not key.startswith("_") and key != "dtype"}
    return {**raw, **kept, "architectures": [type(model).__name__]}
