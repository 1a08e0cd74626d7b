"""The trained model of a run, or of a PEFT adapter folder made elsewhere, ready to be asked or measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.archs import shape_from_config
from peftkit.errors import Problem, UserError
from peftkit.model.identity import refuse_other_base
from peftkit.plan import Plan
from peftkit.plan.resolve import how_to_generate, plain_base
from peftkit.plan.task import FORMAT_TASKS
from peftkit.report import read_plan
from peftkit.rundir import MANIFEST, RunDir, verify_folder


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


def _run_of(path: Path) -> Path:
    """The run directory that `path` is or lies in."""
    return (
        path.parent if path.name in {"adapter", "model"} and (path.parent / "plan.json").is_file() else path
    )


def open_result(path: Path) -> Result:
    """Load what a run trained, or an adapter folder on its base. Raises UserError where there is none."""
    place = _run_of(path)
    if not (place / "plan.json").is_file() and (path / "adapter_config.json").is_file():
        return _foreign(path)
    run = RunDir.open(place)
    plan = read_plan(run)
    folder = run.adapter if plan.method.peft else run.model
    if not folder.is_dir():
        fix = f"go on with it: peftkit resume {path}"
        raise UserError(Problem(str(path), "a run without a result", "a finished run", fix))
    _refuse_damaged(folder)
    from peftkit.model.adapter import load_adapter
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import load_model, load_tokenizer, loadable
    from peftkit.model.locate import locate

    device = detect_device().kind
    tokenizer = load_tokenizer(str(folder), plan.base)
    if plan.method.peft is None:
        model = load_model(str(folder), plan.base, device=device)
    else:
        source = loadable(locate(plan.base.id, revision=plan.base.revision, where="base"), "base")
        refuse_other_base(folder, source, plan.base)
        model = load_adapter(load_model(source, plan.base, device=device), folder)
    how = plan.evaluate
    return Result(model, tokenizer, plan.base.task, plan, run, how.generation_batch, how.use_cache)


def _refuse_damaged(folder: Path) -> None:
    """Raises UserError where a published folder is not as it was written."""
    if faults := verify_folder(folder):
        fix = "take it from a copy, or train anew"
        raise UserError([Problem(str(folder), fault, "files as peftkit wrote them", fix) for fault in faults])


def _adapter_config(path: Path) -> dict[str, Any]:
    """PEFT's configuration in an adapter folder, found whole."""
    from peftkit.model.contained import check_adapter_weights, check_folder, read_json_file

    file = path / "adapter_config.json"
    check_folder(path)
    config = read_json_file(path, file.name)
    if not config.get("base_model_name_or_path"):
        raise UserError(Problem(str(file), "no base_model_name_or_path", "the base that it was trained on"))
    check_adapter_weights(path)
    return config


def _foreign(path: Path) -> Result:
    """An adapter away from its run, on the base that its configuration names, unquantized."""
    from peftkit.model.adapter import PEFT_TASKS, load_adapter
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import load_model, load_tokenizer, loadable
    from peftkit.model.locate import locate
    from peftkit.model.shapes import shape_of_base

    config, where = _adapter_config(path), str(path / "adapter_config.json")
    if (path / MANIFEST).is_file():  # made by peftkit, and away from its run
        _refuse_damaged(path)
    task = {theirs: ours for ours, theirs in PEFT_TASKS.items()}.get(
        str(config.get("task_type")), "causal-lm"
    )
    if task in FORMAT_TASKS.values():
        got = f"an adapter for {task} away from its run"
        raise UserError(Problem(str(path), got, "the run, which knows the names of the classes"))
    base = locate(config["base_model_name_or_path"], revision=config.get("revision"), where=where)
    shape = shape_of_base(
        base, task=task, data_format=None, num_labels=0, trust_remote_code=False, where=where
    )
    device = detect_device()
    plan = plain_base(
        shape,
        id=base.id,
        kind=base.kind,
        revision=config.get("revision"),
        dtype="bfloat16" if device.kind == "cuda" else "float32",
    )
    source = loadable(base, where)
    refuse_other_base(path, source, plan)
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(path) if has_tokenizer else source, replace(plan, revision=None))
    model = load_adapter(load_model(source, plan, device=device.kind), path)
    virtual = "num_virtual_tokens" in config
    batch, use_cache = how_to_generate(shape.family, virtual_tokens=virtual)
    return Result(model, tokenizer, task, None, None, batch, use_cache)


def positions_of(result: Result) -> int | None:
    """How many tokens a model has learned positions for, without virtual ones; None where it has no limit."""
    shape = shape_from_config(result.model.config.to_dict(), task=result.task)
    if shape is None or shape.positions != "learned":
        return None
    adapted = getattr(result.model, "active_peft_config", None)
    return shape.dims.positions - int(getattr(adapted, "num_virtual_tokens", 0) or 0)
