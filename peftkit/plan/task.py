"""The task of a training, decided by the recipe, the data's format and the family's heads; its trainer."""

from __future__ import annotations

from peftkit.archs import TASKS, Family, Task, task_of
from peftkit.errors import Problem
from peftkit.objectives import FORMAT_TASKS, OBJECTIVES, TrainerSpec
from peftkit.plan.plan import Plan


def trainer_spec(plan: Plan) -> TrainerSpec:
    """Return the trainer that a plan's objective takes for its model and data.

    TRL's fused loss reads the head past PEFT's wrapper of single token rows, and knows no weights nor smoothing.
    """
    objective = OBJECTIVES[plan.base.task]
    can_fuse = not (plan.base.inferred or plan.method.token_rows or plan.data.weighted or plan.train.label_smoothing)
    return objective.fused_trainer if objective.fused_trainer and can_fuse else objective.trainer


def decide_task(task_option: str, data_format: str | None, family: Family | None, where: str) -> Task | Problem:
    """Return the task, or the problem with it. `family` is None for an unknown model."""
    data_task = FORMAT_TASKS.get(data_format or "")
    if task_option != "auto" and data_task and data_task != task_option:
        return Problem(where, f"{task_option} on {data_format} data", data_task, "the data decides: leave task at auto")
    task_name = data_task or task_option
    if family is None:
        return next((task for task in TASKS if task == task_name), "causal-lm")
    task = task_of(family, task_name)
    if task is None:
        heads = ", ".join(family.heads)
        return Problem(where, f"{task_name} on {family.name}", f"a task that it has a head for: {heads}")
    if not OBJECTIVES[task].generates_answers and data_format is not None and data_task is None:
        got = f"{data_format} data for {family.name}, which is trained for {task}"
        fix = "columns text and label, or tokens and tags; or use a decoder as base"
        return Problem("data.format", got, f"{task} data", fix)
    if task == "seq2seq" and data_format == "text":
        got = f"raw text for {family.name}, which reads one text and writes another"
        return Problem("data.format", got, "prompts with completions", "map columns, or use a decoder as base")
    return task
