"""Checks of the adapter that a training starts from, before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.methods import METHODS
from peftkit.model.adapter.load import ADAPTER_WEIGHTS, read_adapter_config, refuse_unknown_type
from peftkit.model.base.file_checks import check_adapter_weights, check_model_folder
from peftkit.model.base.identity import read_identity, refuse_other_base
from peftkit.plan.plan import BasePlan, read_plan
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.paths import path_exists
from peftkit.recipe.start import adapter_folder, differences, settings_of
from peftkit.rundir import MANIFEST, RunDir, sha256_of, verify_folder
from peftkit.rundir.events import Observer, WarningEvent


def start_sha256(loaded: LoadedRecipe) -> str | None:
    """Return the hash of the weights that a training starts from; None without, or where they are gone."""
    path = loaded.recipe.start_from
    file = adapter_folder(Path(path), "start_from") / ADAPTER_WEIGHTS if path and path_exists(Path(path)) else None
    return sha256_of(file) if file is not None and file.is_file() else None


def require_start(loaded: LoadedRecipe, source: str, base: BasePlan, labels: Sequence[str], observer: Observer) -> None:
    """Raise UserError unless the adapter of `start_from` is whole, as the recipe describes it, and of this base.

    A classifier's must be of the same classes, which only a run knows.
    """
    where = loaded.where(("start_from",))
    folder = adapter_folder(Path(str(loaded.recipe.start_from)), where)
    check_model_folder(folder)
    refuse_unknown_type(read_adapter_config(folder), where)
    check_adapter_weights(folder)
    faults = verify_folder(folder) if (folder / MANIFEST).is_file() else []
    method = loaded.recipe.method.model_dump(mode="json")
    start = settings_of(folder, where, loaded.recipe.method.name)["method"]
    problems = [Problem(where, f"{folder} with {fault}", "files as peftkit wrote them") for fault in faults]
    for key in differences(method, start):
        fix = "leave it out: the adapter has its own"
        problems.append(
            Problem(loaded.where(("method", key)), f"{method[key]}", f"{start[key]}, as in start_from", fix)
        )
    run = RunDir(folder.parent)
    trained_labels = read_plan(run).base.labels if (run.path / "plan.json").is_file() else ()
    if tuple(labels) != tuple(trained_labels):
        got = f"data of the classes {', '.join(labels) or 'none'}"
        expected = f"those of the adapter: {', '.join(trained_labels) or 'unknown without its run'}"
        problems.append(Problem(loaded.where(("data", "train")), got, expected))
    if problems:
        raise UserError(problems)
    refuse_other_base(folder, source, base)
    identity, is_4bit = read_identity(folder), METHODS[loaded.recipe.method.name].quantized
    if identity and bool(identity.get("quantization")) != is_4bit:
        now, then = ("in 4 bit", "without") if is_4bit else ("without 4 bit", "in 4 bit")
        text = f"start_from: its base is loaded {now}, and was {then} when it was trained: its losses will differ"
        observer(WarningEvent(text=text))
    if not identity:
        text = f"start_from: nothing in {folder.name} says what base it was trained on; it is taken to be {base.id}"
        observer(WarningEvent(text=text))
