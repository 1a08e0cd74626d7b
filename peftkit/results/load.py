"""The trained model of a run, or of a standalone PEFT adapter, loaded for generation and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peftkit.archs import Task, shape_from_config
from peftkit.errors import Problem, UserError
from peftkit.model.adapter.load import load_adapter
from peftkit.model.load import load_model, load_tokenizer
from peftkit.plan import Plan, read_plan
from peftkit.plan.resolve import generation_settings
from peftkit.recipe.paths import path_exists
from peftkit.results.find import (
    RUN_OR_ADAPTER,
    Adapter,
    find_adapter,
    is_standalone_adapter,
    refuse_damaged,
    run_folder,
)
from peftkit.rundir import RunDir


@dataclass(frozen=True)
class Result:
    """A loaded model with its tokenizer. `plan` and `run` are None for an adapter made elsewhere."""

    model: Any
    tokenizer: Any
    task: str
    plan: Plan | None
    run: RunDir | None
    generation_batch: int
    use_cache: bool


def open_result(path: Path) -> Result:
    """Load the result of a run, or an adapter on its base. Raises UserError where there is none."""
    if not path_exists(path):
        raise UserError(Problem(str(path), "nothing there", RUN_OR_ADAPTER))
    from peftkit.model.hardware import detect_device

    device = detect_device().kind
    if is_full_finetuning_run(path):
        run = RunDir.open(run_folder(path))
        plan = read_plan(run)
        refuse_damaged(run.model)
        tokenizer = load_tokenizer(str(run.model), plan.base)
        model = load_model(str(run.model), plan.base, device=device)
        options = plan.evaluate
        return Result(model, tokenizer, plan.base.task, plan, run, options.generation_batch, options.use_cache)
    return load_adapter_result(find_adapter(path), device=device)


def is_full_finetuning_run(path: Path) -> bool:
    """Return whether a path is a finished run of full fine-tuning."""
    folder = run_folder(path)
    if is_standalone_adapter(path) or not (folder / "plan.json").is_file():
        return False
    run = RunDir.open(folder)
    return read_plan(run).method.peft is None and run.model.is_dir()


def load_adapter_result(adapter: Adapter, *, device: str) -> Result:
    """Load an adapter with its base and tokenizer for inference, the base as it was in training."""
    plan = adapter.plan
    has_tokenizer = (adapter.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        str(adapter.folder) if has_tokenizer else adapter.source,
        replace(adapter.base, revision=None) if has_tokenizer else adapter.base,
    )
    model = load_adapter(load_model(adapter.source, adapter.base, device=device), adapter.folder)
    if plan is not None:
        options = plan.evaluate
        batch, use_cache = options.generation_batch, options.use_cache
    else:
        shape = shape_from_config(model.config.to_dict(), task=cast(Task, adapter.base.task))
        family = shape.family if shape is not None else None
        batch, use_cache = (
            generation_settings(family, virtual_tokens="num_virtual_tokens" in adapter.config)
            if family is not None
            else (1, True)
        )
    return Result(model, tokenizer, adapter.base.task, plan, adapter.run, batch, use_cache)


def num_learned_positions(result: Result) -> int | None:
    """Return the number of learned positions, without virtual tokens; None where there is no limit."""
    shape = shape_from_config(result.model.config.to_dict(), task=result.task)
    if shape is None or shape.positions != "learned":
        return None
    peft_config = getattr(result.model, "active_peft_config", None)
    return shape.dims.positions - int(getattr(peft_config, "num_virtual_tokens", 0) or 0)
