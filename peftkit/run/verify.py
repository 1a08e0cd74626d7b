"""Every file of a run against what is known of it."""

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
class Checked:
    """One file or folder of a run, and what is wrong with it."""

    name: str
    size_bytes: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """All that a run holds. `newest_step` is where a resume would go on; 0 is the start."""

    path: Path
    checked: tuple[Checked, ...]
    newest_step: int
    is_finished: bool

    @property
    def faults(self) -> tuple[str, ...]:
        return tuple(fault for one in self.checked for fault in one.faults)

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, size, what is wrong or 'whole')."""
        return [(c.name, show_bytes(c.size_bytes), "; ".join(c.faults) or "whole") for c in self.checked]

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def verify(path: Path) -> Verification:
    """Read every file of a run again. Raises UserError where `path` holds no run."""
    run = RunDir.open(path)
    checked = [_recipe(run), *_as_given(run)]
    for name in ("plan.json", "environment.json", "data.json"):
        if name == "plan.json" or (path / "plan.json").exists():
            checked.append(_sealed(path / name))
    if run.events_file.exists():
        checked.append(_events(run))
    folders = [run.checkpoint(step) for step in run.checkpoint_steps()]
    folders += [path / "adapter_start", run.adapter, run.model]
    folders += sorted(path.glob("growths/*/checkpoints/step-*"))  # of before an escalation
    checked += [
        replace(_sealed(file), name=str(file.relative_to(path)))
        for file in sorted(path.glob("growths/*/plan.json"))
    ]
    found = [_folder(path, folder) for folder in folders]
    # a run that goes on may have rotated a checkpoint away meanwhile
    checked += [one for one, folder in zip(found, folders, strict=True) if folder.exists()]
    checkpoint, _ = run.newest_checkpoint()
    return Verification(path, tuple(checked), step_of(checkpoint), run.adapter.exists() or run.model.exists())


def _recipe(run: RunDir) -> Checked:
    """resolved.yaml must load, and be what the run began with."""
    file = run.path / "resolved.yaml"
    loaded = load(file)
    sha256, faults = recipe_sha256(loaded), list[str]()
    if file.read_bytes() != resolved_text(loaded).encode():
        faults = [f"{file.name} was changed after it was written"]
    environment = run.path / "environment.json"
    if environment.exists() and not verify_sealed(environment):
        before = read_json(environment)["fingerprints"]["recipe"]
        if before != sha256:
            faults = [f"{file.name} was changed after the run began"]
    return Checked(file.name, file.stat().st_size, tuple(faults))


def _as_given(run: RunDir) -> list[Checked]:
    """recipe.yaml, once environment.json tells its hash."""
    file, environment = run.path / "recipe.yaml", run.path / "environment.json"
    if not environment.exists() or verify_sealed(environment):
        return []
    if not file.is_file():
        return [Checked(file.name, 0, (f"{file.name} is missing",))]
    kept = read_json(environment).get("recipe_file_sha256")
    faults = () if kept in {None, sha256_of(file)} else (f"{file.name} was changed after it was written",)
    return [Checked(file.name, file.stat().st_size, faults)]


def _sealed(file: Path) -> Checked:
    faults = verify_sealed(file)
    if file.name == "plan.json" and not faults:
        read_plan(RunDir(file.parent))
    return Checked(file.name, file.stat().st_size if file.exists() else 0, tuple(faults))


def _events(run: RunDir) -> Checked:
    """Each line is one event; a last one cut by a kill is none."""
    faults = []
    try:
        run.events()
    except UserError as error:
        faults.append(f"{error.problems[0].where} is no event")
    return Checked(run.events_file.name, run.events_file.stat().st_size, tuple(faults))


def _folder(root: Path, folder: Path) -> Checked:
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    faults = verify_folder(folder)
    if not faults:
        known = {*read_json(folder / MANIFEST)["files"], MANIFEST}
        extra = sorted({path.relative_to(folder).as_posix() for path in files} - known)
        faults = [f"{folder.name}/{name} is not in its {MANIFEST}" for name in extra]
    size = sum(path.stat().st_size for path in files if path.exists())
    return Checked(folder.relative_to(root).as_posix(), size, tuple(faults))
