"""An objective is data: what it names exists, and fits its task."""

from importlib import import_module
from typing import get_args

import pytest

from peftkit.archs import TASKS
from peftkit.objectives import FORMAT_TASKS, OBJECTIVES
from peftkit.recipe.schema import EvaluateOptions, FormatName


def test_each_task_has_one_objective():
    assert set(OBJECTIVES) == set(TASKS)
    assert len({objective.name for objective in OBJECTIVES.values()}) == len(OBJECTIVES)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=lambda objective: objective.name)
def test_what_an_objective_names_exists(objective):
    from transformers import Trainer, TrainingArguments

    for spec in filter(None, (objective.trainer, objective.fused_trainer)):
        trainer, arguments = (
            getattr(import_module(module), name)
            for module, name in (spec.trainer.rsplit(".", 1), spec.arguments_class.rsplit(".", 1))
        )
        assert issubclass(trainer, Trainer) and issubclass(arguments, TrainingArguments)
        assert set(spec.arguments) <= set(arguments.__dataclass_fields__)
    assert set(objective.formats) <= set(get_args(FormatName))
    known = str(EvaluateOptions.model_fields["metric"].annotation)
    assert objective.metrics and all(repr(metric) in known for metric in objective.metrics)


def test_formats_lead_to_their_task_and_metrics_to_a_default():
    assert {name: name for name in ("classification", "multi-label", "token-classification")} == FORMAT_TASKS
    assert OBJECTIVES["causal-lm"].default_metric[0] == "none"
    assert OBJECTIVES["classification"].default_metric == ("accuracy", "usual for classification")
