"""From a plan to its memory: traced where the model can be, in closed form elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftkit.plan import Plan
from peftkit.plan.memory import Batch

if TYPE_CHECKING:
    from peftkit.model.trace.step import Traced


def traced(plan: Plan, config: Mapping[str, Any], batch: Batch) -> Traced:
    """The ledger of one step and one evaluation of `plan` on the meta device.

    Raises whatever the model's code raises there.
    """
    from peftkit.evaluate.losses import inputs_of, summed_loss
    from peftkit.model.load import read_config
    from peftkit.model.trace.step import trace
    from peftkit.train.assemble import objective
    from peftkit.train.objectives import sft, supervised

    task = plan.base.task
    fused = objective(plan) is sft

    def trained(model: Any, inputs: Mapping[str, Any]) -> Any:
        return supervised.loss(model, inputs, task)

    def held_out(model: Any, inputs: Mapping[str, Any]) -> Any:
        return summed_loss(model(**inputs_of(model, inputs, task)).logits, inputs["labels"], task)

    return trace(plan, read_config(config), batch, loss=None if fused else trained, evaluate=held_out)
