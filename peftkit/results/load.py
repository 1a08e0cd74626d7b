"""The trained model of a run, or of a PEFT adapter folder made elsewhere, ready to be asked or measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peftkit.archs import Task, shape_from_config
from peftkit.errors import Problem, UserError
from peftkit.plan import Plan, read_plan
from peftkit.plan.resolve import how_to_generate
from peftkit.recipe.paths import stands
from peftkit.results.find import WHAT, Adapter, find_adapter, is_away, refuse_damaged, run_of
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
    """Load what a run trained, or an adapter folder on its base. Raises UserError where there is none."""
    if not stands(path):
        raise UserError(Problem(str(path), "nothing there", WHAT))
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import load_model, load_tokenizer

    device = detect_device().kind
    if is_whole(path):
        run = RunDir.open(run_of(path))
        plan = read_plan(run)
        refuse_damaged(run.model)
        tokenizer = load_tokenizer(str(run.model), plan.base)
        model = load_model(str(run.model), plan.base, device=device)
        how = plan.evaluate
        return Result(model, tokenizer, plan.base.task, plan, run, how.generation_batch, how.use_cache)
    return load_result(find_adapter(path), device=device)


def is_whole(path: Path) -> bool:
    """Whether a path is a run of full fine-tuning with its result."""
    place = run_of(path)
    if is_away(path) or not (place / "plan.json").is_file():
        return False
    run = RunDir.open(place)
    return read_plan(run).method.peft is None and run.model.is_dir()


def load_result(adapter: Adapter, *, device: str) -> Result:
    """An adapter with its base and tokenizer, loaded as it was trained, for inference."""
    from peftkit.model.adapter.load import load_adapter
    from peftkit.model.load import load_model, load_tokenizer

    plan = adapter.plan
    own = (adapter.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        str(adapter.folder) if own else adapter.source,
        replace(adapter.base, revision=None) if own else adapter.base,
    )
    model = load_adapter(load_model(adapter.source, adapter.base, device=device), adapter.folder)
    if plan is not None:
        how = plan.evaluate
        batch, use_cache = how.generation_batch, how.use_cache
    else:
        shape = shape_from_config(model.config.to_dict(), task=cast(Task, adapter.base.task))
        family = shape.family if shape is not None else None
        batch, use_cache = (
            how_to_generate(family, virtual_tokens="num_virtual_tokens" in adapter.config)
            if family is not None
            else (1, True)
        )
    return Result(model, tokenizer, adapter.base.task, plan, adapter.run, batch, use_cache)


def positions_of(result: Result) -> int | None:
    """How many tokens a model has learned positions for, without virtual ones; None where it has no limit."""
    shape = shape_from_config(result.model.config.to_dict(), task=result.task)
    if shape is None or shape.positions != "learned":
        return None
    adapted = getattr(result.model, "active_peft_config", None)
    return shape.dims.positions - int(getattr(adapted, "num_virtual_tokens", 0) or 0)
