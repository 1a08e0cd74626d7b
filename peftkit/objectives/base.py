"""The interface of an objective: what a training optimizes, as data. Each objective is one file, one per task.

Nothing here imports torch: classes are named, and `train/trainer.py` builds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peftkit.archs import Task

HealthSign = Literal["dependence on the question"]


@dataclass(frozen=True)
class TrainerSpec:
    """A trainer class and its arguments class by name, with the arguments that the objective adds.

    `loss` is "logits", or "fused": the model's own head computes it without holding all logits.
    """

    trainer: str
    arguments_class: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    loss: Literal["logits", "fused"] = "logits"


@dataclass(frozen=True)
class Objective:
    """What a training optimizes: its task, the data and the trainer that it takes, and its health signs.

    Args:
        task: the head that the model needs.
        formats: the data formats that only this objective learns from; empty where prompts and answers do.
        metrics: metrics on held-out rows, the first by default unless answers have to be generated for it.
        trainer: the trainer that works for every model.
        fused_trainer: a leaner one for models whose head computes the loss, on rows without weights.
        generates_answers: whether the model writes its answers; otherwise it picks among classes.
        health_signs: what tells a sound training from a broken one, beside the losses and gradient norms.
    """

    name: str
    summary: str
    task: Task
    formats: tuple[str, ...]
    metrics: tuple[str, ...]
    trainer: TrainerSpec
    fused_trainer: TrainerSpec | None = None
    generates_answers: bool = False
    health_signs: tuple[HealthSign, ...] = ()

    @property
    def default_metric(self) -> tuple[str, str]:
        """The metric for `metric: auto`, and why: "none" where generating answers would cost time."""
        if self.generates_answers:
            return "none", f"generating answers takes time: ask for {' or '.join(self.metrics)}"
        return self.metrics[0], f"usual for {self.task}"
