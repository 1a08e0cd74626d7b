"""Shape of a base with the task's head: from its family, or inferred from its code."""

from __future__ import annotations

from peftkit.archs import ModelShape, family_of, shape_from_config
from peftkit.errors import Problem, UserError
from peftkit.model.base.locate import LocatedBase
from peftkit.model.base.remote_code import refuse_foreign_code
from peftkit.model.base.unknown_family import infer_shape_from_code
from peftkit.plan.task import decide_task

# Keys that only configurations of models for other things than text have.
_MODALITY_KEYS = {
    "vision": ("vision_config", "image_size", "num_channels", "patch_size"),
    "audio": ("audio_config", "num_mel_bins", "feat_extract_norm", "sampling_rate", "audio_encoder"),
}


def refuse_other_modalities(base: LocatedBase, where: str) -> None:
    """Raise UserError for a vision or audio model, naming the text model inside it where there is one."""
    config = base.config or {}
    for modality, keys in _MODALITY_KEYS.items():
        key = next((key for key in keys if key in config), None)
        if key is not None:
            fix = "peftkit trains text models: take the text model of the same makers"
            got = f"{base.id}, a model for {modality} ({config.get('model_type')}: its config.json has {key})"
            raise UserError(Problem(where, got, "a text model", fix))


def infer_base_shape(
    base: LocatedBase,
    *,
    task: str,
    data_format: str | None,
    num_labels: int,
    trust_remote_code: bool,
    where: str,
    revision: str | None = None,
) -> ModelShape:
    """Return the base's shape with the head for task and data.

    A model of unknown family is built on the meta device. Raises UserError for a configuration with invalid
    sizes or of another modality, and for a task without a head.
    """
    refuse_other_modalities(base, where)
    if trust_remote_code:
        refuse_foreign_code(base.config or {}, base.id, where)
    config = {**(base.config or {}), "num_labels": max(2, num_labels)}
    family = family_of(str(config.get("model_type", "")))
    if family is None and task == "auto" and config.get("is_encoder_decoder") and data_format is None:
        task = "seq2seq"
    resolved_task = decide_task(task, data_format, family, where)
    if isinstance(resolved_task, Problem):
        raise UserError(resolved_task)
    try:
        shape = shape_from_config(config, task=resolved_task)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        message = error.args[0] if error.args else error
        got = f"a config.json with missing or invalid sizes ({message})"
        raise UserError(
            Problem(f"base {base.id}", got, "valid sizes", "compare it with the original config.json of the model")
        ) from None
    if shape is not None:
        return shape

    return infer_shape_from_code(
        base.id if base.path is None else str(base.path),
        config,
        revision=revision,
        task=resolved_task,
        num_labels=max(2, num_labels),
        trust_remote_code=trust_remote_code,
        where=where,
    )
