"""Layout of a base without its weights: parameter shapes, ties, 4-bit layers, and where file tensors go."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import Problem, UserError, first_line
from peftkit.model.base.file_checks import conversion_fix, pickled_weights
from peftkit.model.base.identity import local_base_folder, weight_files
from peftkit.model.base.remote_code import check_remote_code
from peftkit.model.meta.blank import model_from_config
from peftkit.model.meta.layout import Placement, place_tensors, tied_parameters
from peftkit.model.quantize import find_4bit_layers, patched_loading
from peftkit.plan.plan import BasePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DOWNLOAD_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")


def fetch_weights(source: str, plan: BasePlan) -> Path:
    """Return the folder of a base's weights, downloading them where needed.

    Raises UserError where they are pickled only, or cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    folder = local_base_folder(source, plan.revision)
    if folder is None or not (weight_files(folder) or Path(source).is_dir()):
        try:
            snapshot = snapshot_download(source, revision=plan.revision, allow_patterns=list(_DOWNLOAD_PATTERNS))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            got = f"weights that cannot be downloaded ({first_line(error)})"
            fix = "the hub must be reachable and the model's licence accepted, or use a local folder"
            raise UserError(Problem(f"base {plan.id}", got, "a base that can be downloaded", fix)) from None
        folder = Path(snapshot)
    if not weight_files(folder):
        pickled = pickled_weights(folder)
        got = f"{pickled[0]} only" if pickled else "no weights, or not all the files in its index"
        fix = conversion_fix(folder) if pickled else ""
        raise UserError(Problem(f"base {plan.id}", got, "weights as safetensors", fix))
    return folder


@dataclass(frozen=True)
class BaseLayout:
    """The layout of a base.

    `shapes` by parameter; `in_4bit` as `find_4bit_layers` returns it, `ties` as `tied_parameters` does.
    `config` is the merged model's config.json: the base's own, with the changes that training made.
    """

    placements: Mapping[str, Placement]  # by the name in the base's files
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, tuple[str, ...]]
    in_4bit: Mapping[str, bool]
    tables: frozenset[str]  # the embeddings and all that is tied to them
    config: Mapping[str, Any]


def meta_model(source: str, plan: BasePlan, *, vocabulary: int | None = None) -> PreTrainedModel:
    """Build the base on the meta device, without 4-bit layers.

    `vocabulary` is the number of rows where its tables were resized.
    """
    from transformers import AutoConfig

    check_remote_code(source, plan)
    config = AutoConfig.from_pretrained(source, revision=plan.revision, trust_remote_code=plan.trust_remote_code)
    model = model_from_config(replace(plan, quant_type=None), config, device="meta")
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def read_base_layout(
    source: str, plan: BasePlan, folder: Path, names: Iterable[str], *, vocabulary: int | None = None
) -> BaseLayout:
    """Read the layout of a base that merging needs; `names` are those of the tensors in its files."""
    from transformers import AutoConfig

    with patched_loading(plan):
        model = meta_model(source, plan, vocabulary=vocabulary)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        # the base's config.json with what differs in the trained model: head, labels, positions
        file_values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        base_config = AutoConfig.from_pretrained(
            source, revision=plan.revision, trust_remote_code=plan.trust_remote_code
        )
        model_values = json.loads(model.config.to_json_string(use_diff=False))
        base_values = json.loads(base_config.to_json_string(use_diff=False))
        changes = {key: value for key, value in model_values.items() if value != base_values.get(key)}
        public_changes = {key: value for key, value in changes.items() if not key.startswith("_") and key != "dtype"}
        merged_config = {**file_values, **public_changes, "architectures": [type(model).__name__]}
        tied_names, placements, config = (tied_parameters(model), place_tensors(model, names), merged_config)
        table = model.get_input_embeddings().weight
        tables = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is table}
        in_4bit = find_4bit_layers(model, plan)
    return BaseLayout(placements, shapes, tied_names, in_4bit, frozenset(tables), config)
