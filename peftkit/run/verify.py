"""Verification of every file of a run against its manifest or seal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from peftkit.errors import UserError
from peftkit.plan import read_plan
from peftkit.prepare.environment import recipe_sha256, resolved_text
from peftkit.recipe import load
from peftkit.rundir import MANIFEST, RunDir, read_json, sha256_of, step_of, verify_folder, verify_sealed
from peftkit.units import html_table, show_bytes


@dataclass(frozen=True)
class CheckedFile:
    """One file or folder of a run, with its faults."""

    name: str
    size_bytes: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """The verification of a run. `newest_step` is where a resume would continue; 0 is the start."""

    path: Path
    checked: tuple[CheckedFile, ...]
    newest_step: int
    is_finished: bool

    @property
    def faults(self) -> tuple[str, ...]:
        return tuple(fault for one in self.checked for fault in one.faults)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (name, size, faults or 'whole') rows for a table."""
        return [(c.name, show_bytes(c.size_bytes), "; ".join(c.faults) or "whole") for c in self.checked]

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def verify(path: Path) -> Verification:
    """Verify every file of a run. Raises UserError where `path` holds no run."""
    run = RunDir.open(path)
    file, environment = run.path / "recipe.yaml", run.path / "environment.json"
    if not environment.exists() or verify_sealed(environment):
        as_given = []
    elif not file.is_file():
        as_given = [CheckedFile(file.name, 0, (f"{file.name} is missing",))]
    else:
        recorded_sha256 = read_json(environment).get("recipe_file_sha256")
        is_same = recorded_sha256 in {None, sha256_of(file)}
        given_faults = () if is_same else (f"{file.name} was changed after it was written",)
        as_given = [CheckedFile(file.name, file.stat().st_size, given_faults)]
    # resolved.yaml must load, and be what the run began with
    file = run.path / "resolved.yaml"
    loaded = load(file)
    sha256, faults = recipe_sha256(loaded), list[str]()
    if file.read_bytes() != resolved_text(loaded).encode():
        faults = [f"{file.name} was changed after it was written"]
    if environment.exists() and not verify_sealed(environment):
        recorded_sha256 = read_json(environment)["fingerprints"]["recipe"]
        if recorded_sha256 != sha256:
            faults = [f"{file.name} was changed after the run began"]
    recipe = CheckedFile(file.name, file.stat().st_size, tuple(faults))
    checks = [recipe, *as_given]
    for name in ("plan.json", "environment.json", "data.json"):
        if name == "plan.json" or (path / "plan.json").exists():
            checks.append(_check_sealed(path / name))
    if run.events_file.exists():
        # each line is one event; a last one cut by a kill is none
        line_faults = []
        try:
            run.events()
        except UserError as error:
            line_faults.append(f"{error.problems[0].where} is not an event")
        events = CheckedFile(run.events_file.name, run.events_file.stat().st_size, tuple(line_faults))
        checks.append(events)
    folders = [run.checkpoint(step) for step in run.checkpoint_steps()]
    folders += [path / "adapter_start", run.adapter, run.model]
    folders += sorted(path.glob("growths/*/checkpoints/step-*"))  # of before an escalation
    checks += [
        replace(_check_sealed(file), name=str(file.relative_to(path)))
        for file in sorted(path.glob("growths/*/plan.json"))
    ]
    folder_checks = [_check_folder(path, folder) for folder in folders]
    # a run that goes on may have rotated a checkpoint away meanwhile
    checks += [check for check, folder in zip(folder_checks, folders, strict=True) if folder.exists()]
    checkpoint, _ = run.newest_checkpoint()
    return Verification(path, tuple(checks), step_of(checkpoint), run.adapter.exists() or run.model.exists())


def _check_sealed(file: Path) -> CheckedFile:
    """Check a sealed file against its hash; plan.json must also load."""
    faults = verify_sealed(file)
    if file.name == "plan.json" and not faults:
        read_plan(RunDir(file.parent))
    return CheckedFile(file.name, file.stat().st_size if file.exists() else 0, tuple(faults))


def _check_folder(root: Path, folder: Path) -> CheckedFile:
    """Check a folder against its manifest, and list files that are not in it."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    faults = verify_folder(folder)
    if not faults:
        manifest_names = {*read_json(folder / MANIFEST)["files"], MANIFEST}
        extra = sorted({path.relative_to(folder).as_posix() for path in files} - manifest_names)
        faults = [f"{folder.name}/{name} is not in its {MANIFEST}" for name in extra]
    size = sum(path.stat().st_size for path in files if path.exists())
    return CheckedFile(folder.relative_to(root).as_posix(), size, tuple(faults))
