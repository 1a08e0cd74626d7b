"""The base of a run without its adapter, for another one on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftkit.methods import METHODS
from peftkit.model.load import load_model
from peftkit.plan import Plan
from peftkit.prepare.context import RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def needs_reload(plan: Plan) -> bool:
    """Return whether unwrapping the model does not restore its base."""
    spec = plan.method.peft
    return spec is not None and bool(spec.arguments.get("modules_to_save") or plan.method.target_parameters)


def unwrap_base(context: RunContext, model: PreTrainedModel) -> PreTrainedModel:
    """Return the base of a wrapped model: unwrapped, or reloaded where unwrapping does not restore it.

    PEFT's `unload` leaves trained copies in place of `modules_to_save`, and parameters that it has wrapped in
    another order, which would nest the next wrappers the other way round.
    """
    if METHODS[context.plan.method.name].virtual_tokens:
        return model.get_base_model()
    if needs_reload(context.plan):
        return load_model(context.source, context.plan.base, device=context.plan.device)
    return model.unload()
