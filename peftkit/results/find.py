"""An adapter located but not loaded: its folder, its base, and how the base was loaded in training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.attach import PEFT_TASKS
from peftkit.model.adapter.load import ADAPTER_CONFIG, read_adapter_config, refuse_unknown_type
from peftkit.model.adapter.old_experts import has_single_experts, with_fused_experts
from peftkit.model.base.file_checks import check_adapter_weights, check_model_folder
from peftkit.model.base.identity import base_plan_fields, lacks_4bit_details, read_identity, refuse_other_base
from peftkit.model.base.locate import BaseNotFoundError, LocatedBase, locate_base
from peftkit.model.base.shape import infer_base_shape
from peftkit.model.load import resolve_source
from peftkit.objectives import OBJECTIVES
from peftkit.plan import Plan, read_plan
from peftkit.plan.plan import BasePlan
from peftkit.plan.resolve import unquantized_base
from peftkit.recipe.paths import path_exists
from peftkit.rundir import MANIFEST, RunDir, verify_folder

RUN_OR_ADAPTER = "a run directory, or an adapter folder"


@dataclass(frozen=True)
class Adapter:
    """An adapter folder with its base. `folder` holds PEFT's files; `source` is what the base is loaded from.

    `base` is how the base is loaded, in 4-bit where it was trained so. `plan` and `run` are None for a
    standalone adapter; then `config` is PEFT's.
    """

    folder: Path
    base: BasePlan
    source: str
    config: dict[str, Any]
    plan: Plan | None = None
    run: RunDir | None = None
    is_4bit_unknown: bool = False  # held in 4-bit, and its files do not say how


def run_folder(path: Path) -> Path:
    """Return the run directory that `path` is or lies in."""
    is_result_folder = path.name in {"adapter", "model"} and (path.parent / "plan.json").is_file()
    return path.parent if is_result_folder else path


def is_standalone_adapter(path: Path) -> bool:
    """Return whether a path is an adapter folder without the run that made it."""
    return not (run_folder(path) / "plan.json").is_file() and (path / "adapter_config.json").is_file()


def find_adapter_folder(path: Path) -> Path:
    """Return the intact folder with the adapter files of a run or of a standalone adapter.

    The base is not looked up. Raises UserError where the path does not exist or the folder is damaged.
    """
    if not path_exists(path):
        raise UserError(Problem(str(path), "nothing there", RUN_OR_ADAPTER))
    if not is_standalone_adapter(path):
        return _run_adapter(path).folder
    read_checked_config(path)
    if (path / MANIFEST).is_file():
        refuse_damaged(path)
    return path


def find_adapter(path: Path, *, base: str | None = None, need_weights: bool = True) -> Adapter:
    """Return a run's adapter or a standalone adapter, intact and on the base that it was trained on.

    `base` is another location of that same base. Without `need_weights` a quantized base is not dequantized.
    Raises UserError where there is none, where it is damaged, or where the base is another one.
    """
    if not path_exists(path):
        raise UserError(Problem(str(path), "nothing there", RUN_OR_ADAPTER))
    if is_standalone_adapter(path):
        config = read_checked_config(path, base=base)
        if (path / MANIFEST).is_file():  # made by peftkit, and away from its run
            refuse_damaged(path)

        is_unknown = lacks_4bit_details(read_identity(path))
        adapter = Adapter(path, standalone_base_plan(path, config, id=base), "", config, is_4bit_unknown=is_unknown)
    else:
        adapter = _run_adapter(path)
    if base is not None:
        adapter = replace(adapter, base=replace(adapter.base, id=base, revision=None))
    location = _locate_adapters_base(adapter.base.id, adapter.base.revision, "--base-model" if base else "base")
    adapter = replace(adapter, source=resolve_source(location, "base", need_weights=need_weights))
    if adapter.run is None and has_single_experts(adapter.folder):
        from peftkit.model.meta.skeleton import meta_model

        folder = with_fused_experts(adapter.folder, meta_model(adapter.source, adapter.base))
        adapter = replace(adapter, folder=folder, config=read_adapter_config(folder))
    refuse_other_base(adapter.folder, adapter.source, adapter.base)
    return adapter


def _locate_adapters_base(base_id: str, revision: str | None, where: str) -> LocatedBase:
    try:
        return locate_base(base_id, revision=revision, where=where)
    except BaseNotFoundError as error:
        fix = "where it lies elsewhere: merge and export take --base-model PATH"
        if where.endswith(ADAPTER_CONFIG):
            fix += "; everything reads base_model_name_or_path, which can be corrected there"
        elif where == "--base-model":
            fix = "give the folder that holds it"
        raise BaseNotFoundError([replace(problem, fix=fix) for problem in error.problems]) from None


def _run_adapter(path: Path) -> Adapter:
    """Return the published adapter of a run. Raises UserError where there is none."""
    folder = run_folder(path)
    if not (folder / "plan.json").is_file() and (path / "config.json").is_file():
        got = "a full model, without an adapter to merge"
        raise UserError(Problem(str(path), got, RUN_OR_ADAPTER, "use or export it as it is"))
    run = RunDir.open(folder)
    plan = read_plan(run)
    if not (run.adapter if plan.method.peft else run.model).is_dir():
        fix = f"finish it: peftkit resume {path}"
        raise UserError(Problem(str(path), "a run without a result", "a finished run", fix))
    if plan.method.peft is None:
        got = "a run of full fine-tuning, which trained the weights themselves"
        raise UserError(Problem(str(path), got, "an adapter", f"its full model is in {run.model}"))
    refuse_damaged(run.adapter)
    return Adapter(run.adapter, plan.base, "", read_checked_config(run.adapter), plan, run)


def refuse_damaged(folder: Path) -> None:
    """Raise UserError where a published folder differs from what was written."""
    if faults := verify_folder(folder):
        fix = "restore it from a copy, or train again"
        raise UserError([Problem(str(folder), fault, "files as peftkit wrote them", fix) for fault in faults])


def read_checked_config(path: Path, *, base: str | None = None) -> dict[str, Any]:
    """Return PEFT's configuration in an adapter folder, after checking it and the weights.

    Raises UserError where the folder is incomplete, or neither the configuration nor `base` names a base.
    """
    check_model_folder(path)
    file, config = str(path / ADAPTER_CONFIG), read_adapter_config(path)
    refuse_unknown_type(config, file)
    named, revision = base or config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(named, str) or not named.strip() or "\0" in named:
        fix = "write it there; merge and export also take --base-model PATH"
        raise UserError(Problem(file, "no base_model_name_or_path", "the base that it was trained on", fix))
    if not isinstance(revision, str | None):
        raise UserError(Problem(f"{file} revision", f"a {type(revision).__name__}", "text, or null"))
    check_adapter_weights(path)
    return config


def standalone_base_plan(path: Path, config: dict[str, Any], *, id: str | None = None) -> BasePlan:
    """Return the plan for the base of a standalone adapter: as peftkit recorded beside it, or as the base is.

    Raises UserError for a classifier, whose class names only the run has.
    """
    from peftkit.model.hardware import detect_device

    where = "--base-model" if id else str(path / ADAPTER_CONFIG)
    task = {peft_task: own_task for own_task, peft_task in PEFT_TASKS.items()}.get(
        str(config.get("task_type")), "causal-lm"
    )
    if not OBJECTIVES[task].generates_answers:
        got = f"an adapter for {task} without its run"
        raise UserError(Problem(str(path), got, "the run, which knows the names of the classes"))
    revision = None if id else config.get("revision")
    base = _locate_adapters_base(id or config["base_model_name_or_path"], revision, where)
    shape = infer_base_shape(base, task=task, data_format=None, num_labels=0, trust_remote_code=False, where=where)
    dtype = "bfloat16" if detect_device().kind == "cuda" else "float32"
    plain_plan = unquantized_base(shape, id=base.id, kind=base.kind, revision=revision, dtype=dtype)
    load_options = base_plan_fields(read_identity(path))
    return replace(
        plain_plan, **{**load_options, "overrides": {**plain_plan.overrides, **load_options.get("overrides", {})}}
    )
