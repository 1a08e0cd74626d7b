"""The trained model of a run, or of a PEFT adapter folder made elsewhere, ready to be asked or measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.plan import Plan
from peftkit.report import read_plan
from peftkit.rundir import RunDir


@dataclass(frozen=True)
class Result:
    """A loaded model with its tokenizer. `plan` and `run` are None for an adapter made elsewhere."""

    model: Any
    tokenizer: Any
    task: str
    plan: Plan | None
    run: RunDir | None


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
    from peftkit.model.adapter import load_adapter
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import load_model, load_tokenizer, loadable
    from peftkit.model.locate import locate

    device = detect_device().kind
    tokenizer = load_tokenizer(str(folder), plan.base)
    if plan.method.peft is None:
        model = load_model(str(folder), plan.base, device=device)
    else:
        base = locate(plan.base.id, revision=plan.base.revision, where="base")
        model = load_adapter(load_model(loadable(base, "base"), plan.base, device=device), folder)
    return Result(model, tokenizer, plan.base.task, plan, run)


def _foreign(path: Path) -> Result:
    """An adapter that some other tool trained, on the base that its configuration names, unquantized."""
    from peftkit.model.adapter import PEFT_TASKS, load_adapter
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import load_model, load_tokenizer, loadable
    from peftkit.model.locate import locate
    from peftkit.plan.plan import BasePlan

    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    named = str(config.get("base_model_name_or_path") or "")
    where = str(path / "adapter_config.json")
    if not named:
        raise UserError(Problem(where, "no base_model_name_or_path", "the base that it was trained on"))
    tasks = {theirs: ours for ours, theirs in PEFT_TASKS.items()}
    device = detect_device()
    plan = BasePlan(
        id=named,
        kind="folder",
        revision=config.get("revision"),
        trust_remote_code=False,
        dtype="bfloat16" if device.kind == "cuda" else "float32",
        quant_type=None,
        double_quant=False,
        compute_dtype="float32",
        task=tasks.get(str(config.get("task_type")), "causal-lm"),
        labels=(),
        inferred=False,
        head_modules=tuple(config.get("modules_to_save") or ()),
        skip_4bit=(),
        experts_4bit=(),
        overrides={},
    )
    source = loadable(locate(named, revision=plan.revision, where=where), where)
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(path) if has_tokenizer else source, replace(plan, revision=None))
    model = load_adapter(load_model(source, plan, device=device.kind), path)
    return Result(model, tokenizer, plan.task, None, None)
