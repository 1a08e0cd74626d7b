"""The shape of a base with the task's head on top: by its family, or by looking at it."""

from __future__ import annotations

from collections.abc import Mapping

from peftkit.archs import ModelShape, family_of, shape_from_config
from peftkit.errors import Problem, UserError
from peftkit.model.base.locate import Base
from peftkit.model.base.remote_code import refuse_foreign_code
from peftkit.plan.task import decide_task

# Keys that only configurations of models for other things than text have.
_SENSES = {
    "vision": ("vision_config", "image_size", "num_channels", "patch_size"),
    "audio": ("audio_config", "num_mel_bins", "feat_extract_norm", "sampling_rate", "audio_encoder"),
}
_TEXT_PARTS = {"llama4": "llama4_text", "gemma3": "gemma3_text", "mistral3": "mistral"}


def refuse_other_senses(base: Base, where: str) -> None:
    """Raises UserError for a vision or audio model, naming the text model inside it where there is one."""
    config = base.config or {}
    for sense, keys in _SENSES.items():
        key = next((key for key in keys if key in config), None)
        if key is not None:
            inner = config.get("text_config")
            part = _TEXT_PARTS.get(str(config.get("model_type"))) or (
                inner.get("model_type") if isinstance(inner, Mapping) else None
            )
            fix = (
                f"its text part alone ({part}) can be trained: save it as a model of its own" if part else ""
            )
            got = f"{base.id}, a model for {sense} ({config.get('model_type')}: its config.json has {key})"
            raise UserError(Problem(where, got, "a model for text", fix))


def shape_of_base(
    base: Base,
    *,
    task: str,
    data_format: str | None,
    num_labels: int,
    trust_remote_code: bool,
    where: str,
    revision: str | None = None,
) -> ModelShape:
    """The base's shape with the head that task and data ask for.

    A model of no known family is looked at. Raises UserError for a configuration that is absurd or no text
    model's, and for a task without a head.
    """
    refuse_other_senses(base, where)
    if trust_remote_code:
        refuse_foreign_code(base.config or {}, base.id, where)
    config = {**(base.config or {}), "num_labels": max(2, num_labels)}
    family = family_of(str(config.get("model_type", "")))
    chosen = decide_task(task, data_format, family, where)
    if isinstance(chosen, Problem):
        raise UserError(chosen)
    try:
        shape = shape_from_config(config, task=chosen)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        text = error.args[0] if error.args else error
        got = f"a config.json with missing or absurd sizes ({text})"
        raise UserError(
            Problem(f"base {base.id}", got, "its sizes", "compare it with the model's own")
        ) from None
    if shape is not None:
        return shape
    from peftkit.model.base.unknown_family import inspect_shape

    return inspect_shape(
        base.id if base.path is None else str(base.path),
        config,
        revision=revision,
        task=chosen,
        num_labels=max(2, num_labels),
        trust_remote_code=trust_remote_code,
        where=where,
    )
