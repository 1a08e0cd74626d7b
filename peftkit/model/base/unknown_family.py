"""A model of no known family, built on the meta device to see its layers: no weights, no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.archs import ModelShape, Task
from peftkit.archs.inferred import Layer, infer_shape
from peftkit.errors import Problem, UserError

AUTO_CLASSES: Mapping[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def _layer(name: str, module: Any) -> Layer | None:
    """A module that holds parameters of its own, described; None for containers."""
    own = list(module.parameters(recurse=False))
    if not own:
        return None
    count = sum(parameter.numel() for parameter in own)
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if weight is not None and weight.ndim == 2:
        d_out, d_in = weight.shape
        bias = getattr(module, "bias", None) is not None
        if kind == "Conv1D":
            return Layer(name, "linear", count, d_out, d_in, bias)
        if kind.endswith("Embedding"):
            return Layer(name, "embedding", count, d_out, d_in)
        if kind.endswith("Linear"):
            return Layer(name, "linear", count, d_in, d_out, bias)
    norm = "norm" in kind.lower() and all(parameter.ndim == 1 for parameter in own)
    return Layer(name, "norm" if norm else "other", count)


def _experts(name: str, module: Any) -> list[Layer]:
    """3-D parameters of a mixture's experts, each as a layer of its own."""
    own = dict(module.named_parameters(recurse=False))
    if "expert" not in f"{name}.{type(module).__name__}".lower() or all(p.ndim != 3 for p in own.values()):
        return []
    return [
        Layer(f"{name}.{key}", "experts", p.numel(), p.shape[2], p.shape[1], num=p.shape[0])
        if p.ndim == 3
        else Layer(f"{name}.{key}", "other", p.numel())
        for key, p in own.items()
    ]


def layers_of(model: Any) -> list[Layer]:
    """Every module with parameters of its own; tied ones once."""
    found: list[Layer] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if not own:
            continue
        seen.update(id(p) for p in own)
        experts = _experts(name, module)
        layer = None if experts else _layer(name, module)
        found += experts or ([layer] if layer else [])
    return found


def inspect_shape(
    source: str,
    config: Mapping[str, Any],
    *,
    revision: str | None,
    task: Task,
    num_labels: int,
    trust_remote_code: bool,
    where: str,
) -> ModelShape:
    """The shape of a model that no family describes, by building it without weights.

    Raises UserError where transformers cannot build it; code that comes with it runs only when trusted.
    """
    import torch
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[task])
    if "auto_map" in config and not trust_remote_code:
        raise UserError(
            Problem(
                where,
                f"{source}, which brings its own code",
                "base.trust_remote_code: true, if you have read and trust it",
                "without its code the model cannot be built; on the hub it also needs base.revision: COMMIT",
            )
        )
    try:
        made = transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
        if task in {"classification", "token-classification"}:
            made.num_labels = num_labels
        with torch.device("meta"):
            model = auto.from_config(made, trust_remote_code=trust_remote_code)
    except Exception as error:
        # whatever the foreign code raises, the base is what the user has to look at
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            Problem(
                where,
                f"{source}, of the unknown family {config.get('model_type')!r} ({line})",
                f"a model that transformers can build for {task}",
            )
        ) from error
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    on_top = names.get(id(head)) or next(
        (n for n, _ in model.named_children() if n in {"score", "classifier"}), "lm_head"
    )
    return infer_shape(
        config,
        layers_of(model),
        task=task,
        embeddings=names[id(model.get_input_embeddings())],
        head=on_top,
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
    )
