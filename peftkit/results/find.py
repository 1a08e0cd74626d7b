"""An adapter found, not loaded: where it lies, on which base, and how that was held while it was trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.plan import Plan, read_plan
from peftkit.plan.plan import BasePlan
from peftkit.plan.resolve import plain_base
from peftkit.plan.task import FORMAT_TASKS
from peftkit.recipe.paths import stands
from peftkit.rundir import MANIFEST, RunDir, verify_folder

WHAT = "a run directory, or an adapter folder"


@dataclass(frozen=True)
class Adapter:
    """`folder` holds PEFT's files; `source` is what the base is loaded from.

    `base` is how the base is held, in 4-bit where it was trained so. `plan` and `run` are None for an adapter
    away from its run; then `config` is PEFT's.
    """

    folder: Path
    base: BasePlan
    source: str
    config: dict[str, Any]
    plan: Plan | None = None
    run: RunDir | None = None
    is_4bit_unknown: bool = False  # held in 4-bit, and its files do not say how


def run_of(path: Path) -> Path:
    """The run directory that `path` is or lies in."""
    inside = path.name in {"adapter", "model"} and (path.parent / "plan.json").is_file()
    return path.parent if inside else path


def is_away(path: Path) -> bool:
    """Whether a path is an adapter's folder without the run that made it."""
    return not (run_of(path) / "plan.json").is_file() and (path / "adapter_config.json").is_file()


def adapter_folder(path: Path) -> Path:
    """Where the files of a run's or of any adapter lie, whole; nobody looks whether its base is there."""
    if not stands(path):
        raise UserError(Problem(str(path), "nothing there", WHAT))
    if not is_away(path):
        return _of_run(path).folder
    adapter_config(path)
    if (path / MANIFEST).is_file():
        refuse_damaged(path)
    return path


def find_adapter(path: Path, *, base: str | None = None) -> Adapter:
    """A run's adapter, or an adapter's folder, whole and on the base that it was trained on.

    `base` is another place of that same base. Raises UserError where there is none, where it is damaged, or
    where the base is another one.
    """
    from peftkit.model.base.identity import refuse_other_base
    from peftkit.model.base.locate import locate
    from peftkit.model.load import loadable

    if not stands(path):
        raise UserError(Problem(str(path), "nothing there", WHAT))
    found = _away(path, base) if is_away(path) else _of_run(path)
    if base is not None:
        found = replace(found, base=replace(found.base, id=base, revision=None))
    try:
        where = locate(found.base.id, revision=found.base.revision, where="base")
    except UserError as error:
        moved = "if it was moved: --base-model PLACE"
        raise UserError([replace(p, fix=p.fix or moved) for p in error.problems]) from None
    found = replace(found, source=loadable(where, "base"))
    refuse_other_base(found.folder, found.source, found.base)
    return found


def _of_run(path: Path) -> Adapter:
    place = run_of(path)
    if not (place / "plan.json").is_file() and (path / "config.json").is_file():
        got = "a whole model, with nothing to merge into it"
        raise UserError(Problem(str(path), got, WHAT, "it is used, and exported, as it is"))
    run = RunDir.open(place)
    plan = read_plan(run)
    if not (run.adapter if plan.method.peft else run.model).is_dir():
        fix = f"go on with it: peftkit resume {path}"
        raise UserError(Problem(str(path), "a run without a result", "a finished run", fix))
    if plan.method.peft is None:
        got = "a run of full fine-tuning, which trained the weights themselves"
        raise UserError(Problem(str(path), got, "an adapter", f"its model stands whole in {run.model}"))
    refuse_damaged(run.adapter)
    return Adapter(run.adapter, plan.base, "", adapter_config(run.adapter), plan, run)


def _away(path: Path, base: str | None) -> Adapter:
    from peftkit.model.base.identity import is_4bit_unknown, read_identity

    config = adapter_config(path)
    if (path / MANIFEST).is_file():  # made by peftkit, and away from its run
        refuse_damaged(path)
    unknown = is_4bit_unknown(read_identity(path))
    return Adapter(path, base_of(path, config, id=base), "", config, is_4bit_unknown=unknown)


def refuse_damaged(folder: Path) -> None:
    """Raises UserError where a published folder is not as it was written."""
    if faults := verify_folder(folder):
        fix = "take it from a copy, or train anew"
        raise UserError([Problem(str(folder), fault, "files as peftkit wrote them", fix) for fault in faults])


def adapter_config(path: Path) -> dict[str, Any]:
    """PEFT's configuration in an adapter folder, found whole."""
    from peftkit.model.adapter.load import CONFIG, read_adapter_config
    from peftkit.model.base.file_checks import check_adapter_weights, check_folder

    check_folder(path)
    file, config = str(path / CONFIG), read_adapter_config(path)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        raise UserError(Problem(file, "no base_model_name_or_path", "the base that it was trained on"))
    if not isinstance(revision, str | None):
        raise UserError(Problem(f"{file} revision", f"a {type(revision).__name__}", "text, or null"))
    check_adapter_weights(path)
    return config


def base_of(path: Path, config: dict[str, Any], *, id: str | None = None) -> BasePlan:
    """How the base of an adapter away from its run is held: as peftkit wrote beside it, or as it is."""
    from peftkit.model.adapter.attach import PEFT_TASKS
    from peftkit.model.base.identity import held_as, read_identity
    from peftkit.model.base.locate import locate
    from peftkit.model.base.shape import shape_of_base
    from peftkit.model.hardware import detect_device

    where = str(path / "adapter_config.json")
    task = {theirs: ours for ours, theirs in PEFT_TASKS.items()}.get(
        str(config.get("task_type")), "causal-lm"
    )
    if task in FORMAT_TASKS.values():
        got = f"an adapter for {task} away from its run"
        raise UserError(Problem(str(path), got, "the run, which knows the names of the classes"))
    revision = None if id else config.get("revision")
    base = locate(id or config["base_model_name_or_path"], revision=revision, where=where)
    shape = shape_of_base(
        base, task=task, data_format=None, num_labels=0, trust_remote_code=False, where=where
    )
    dtype = "bfloat16" if detect_device().kind == "cuda" else "float32"
    plain = plain_base(shape, id=base.id, kind=base.kind, revision=revision, dtype=dtype)
    held = held_as(read_identity(path))
    return replace(plain, **{**held, "overrides": {**plain.overrides, **held.get("overrides", {})}})
