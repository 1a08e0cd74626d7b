"""Shape of a model of unknown family, read from its modules on the meta device: no weights, no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftkit.archs import ModelShape, Task
from peftkit.archs.inferred import InspectedLayer, infer_shape
from peftkit.errors import Problem, UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO_CLASSES: Mapping[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def _describe_layer(name: str, module: Any) -> InspectedLayer | None:
    """Describe a module with parameters of its own; None for containers."""
    parameters = list(module.parameters(recurse=False))
    if not parameters:
        return None
    count = sum(parameter.numel() for parameter in parameters)
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if weight is not None and weight.ndim == 2:
        d_out, d_in = weight.shape
        bias = getattr(module, "bias", None) is not None
        if kind == "Conv1D":
            return InspectedLayer(name, "linear", count, d_out, d_in, bias)
        if kind.endswith("Embedding"):
            return InspectedLayer(name, "embedding", count, d_out, d_in)
        if kind.endswith("Linear"):
            return InspectedLayer(name, "linear", count, d_in, d_out, bias)
    norm = "norm" in kind.lower() and all(parameter.ndim == 1 for parameter in parameters)
    return InspectedLayer(name, "norm" if norm else "other", count)


def list_layers(model: PreTrainedModel) -> list[InspectedLayer]:
    """Return every module with parameters of its own; tied ones once."""
    layers: list[InspectedLayer] = []
    counted_ids: set[int] = set()
    for name, module in model.named_modules():
        parameters = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in counted_ids]
        if not parameters:
            continue
        counted_ids.update(id(parameter) for parameter in parameters)
        own_parameters = dict(module.named_parameters(recurse=False))
        if "expert" not in f"{name}.{type(module).__name__}".lower() or all(
            parameter.ndim != 3 for parameter in own_parameters.values()
        ):
            experts = []
        else:
            experts = [
                InspectedLayer(
                    f"{name}.{key}",
                    "experts",
                    parameter.numel(),
                    parameter.shape[2],
                    parameter.shape[1],
                    num=parameter.shape[0],
                )
                if parameter.ndim == 3
                else InspectedLayer(f"{name}.{key}", "other", parameter.numel())
                for key, parameter in own_parameters.items()
            ]
        layer = None if experts else _describe_layer(name, module)
        layers += experts or ([layer] if layer else [])
    return layers


def infer_shape_from_code(
    source: str,
    config: Mapping[str, object],
    *,
    revision: str | None,
    task: Task,
    num_labels: int,
    trust_remote_code: bool,
    where: str,
) -> ModelShape:
    """Infer the shape of a model of unknown family by building it without weights.

    Raises UserError where transformers cannot build it. Code that comes with it runs only when trusted.
    """
    import torch
    import transformers

    auto_class = getattr(transformers, AUTO_CLASSES[task])
    is_native = config.get("model_type") in transformers.CONFIG_MAPPING  # then transformers' own code is used
    if "auto_map" in config and not trust_remote_code and not is_native:
        raise UserError(
            Problem(
                where,
                f"{source}, which comes with its own code",
                "base.trust_remote_code: true, if you have read and trust it",
                "without its code the model cannot be built; on the hub it also needs base.revision: COMMIT",
            )
        )
    try:
        model_config = transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
        if task in {"classification", "multi-label", "token-classification"}:
            model_config.num_labels = num_labels
        with torch.device("meta"):
            model = auto_class.from_config(model_config, trust_remote_code=trust_remote_code)
    except Exception as error:
        # whatever the foreign code raises, the base is what the user has to look at
        raise UserError(
            Problem(
                where,
                f"{source}, of the unknown family {config.get('model_type')!r} ({first_line(error)})",
                f"a model that transformers can build for {task}",
            )
        ) from error
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    head_name = names.get(id(head)) or next(
        (child_name for child_name, _ in model.named_children() if child_name in {"score", "classifier"}), "lm_head"
    )
    return infer_shape(
        config,
        list_layers(model),
        task=task,
        embeddings=names[id(model.get_input_embeddings())],
        head=head_name,
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
    )
