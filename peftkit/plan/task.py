"""What is trained for: decided by the recipe, the data's format and the family's heads."""

from __future__ import annotations

from peftkit.archs import TASKS, Family, Task, task_of
from peftkit.errors import Problem

# The task that a format of data is for; the other formats suit decoders and encoder-decoders.
FORMAT_TASKS: dict[str, Task] = {
    "classification": "classification",
    "token-classification": "token-classification",
}
METRICS: dict[str, tuple[str, ...]] = {
    "causal-lm": ("exact_match", "token_f1"),
    "seq2seq": ("exact_match", "token_f1"),
    "classification": ("accuracy", "macro_f1"),
    "token-classification": ("entity_f1", "accuracy"),
}


def metric_of(task: str) -> tuple[str, str]:
    """The metric of a task where the recipe says auto, and why; "none" where generating would cost time."""
    if task in {"causal-lm", "seq2seq"}:
        return "none", "generating answers takes time: ask for exact_match or token_f1"
    return METRICS[task][0], f"usual for {task}"


def decide_task(wanted: str, data_format: str | None, family: Family | None, where: str) -> Task | Problem:
    """The task, or why there is none. `family` is None where no entry describes it."""
    by_data = FORMAT_TASKS.get(data_format or "")
    if wanted != "auto" and by_data and by_data != wanted:
        return Problem(
            where, f"{wanted} on {data_format} data", by_data, "the data decides: leave task at auto"
        )
    asked = by_data or wanted
    if family is None:
        return next((task for task in TASKS if task == asked), "causal-lm")
    task = task_of(family, asked)
    if task is None:
        heads = ", ".join(family.heads)
        return Problem(where, f"{asked} on {family.name}", f"a task that it has a head for: {heads}")
    if task in FORMAT_TASKS.values() and data_format is not None and by_data is None:
        got = f"{data_format} data for {family.name}, which is trained for {task}"
        fix = "columns text and label, or tokens and tags; or use a decoder as base"
        return Problem("data.format", got, f"{task} data", fix)
    if task == "seq2seq" and data_format == "text":
        got = f"raw text for {family.name}, which reads one text and writes another"
        return Problem(
            "data.format", got, "prompts with completions", "map columns, or use a decoder as base"
        )
    return task
