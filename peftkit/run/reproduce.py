"""Reproduction of a finished run: the same numbers, or the first step from which they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.plan import read_plan
from peftkit.prepare.environment import find_changes
from peftkit.report import Summary, read_summary
from peftkit.run.finetune import finetune
from peftkit.run.resume import load_run_recipe
from peftkit.rundir import MANIFEST, RunDir, read_json, read_sealed, verify_folder
from peftkit.rundir.disk import next_free_path
from peftkit.rundir.events import Observer, StepEvent, ignore_event, of_type
from peftkit.units import html_table

_COMPARED_FIELDS = ("loss", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class Reproduction:
    """A run and its repetition from the same recipe.

    `first_step` is the first at which a number differs (None where none does), `differing` the files of the
    result that do, `changed` what is not as it was in the first run.
    """

    before: Summary
    after: Summary
    first_step: int | None
    differing: tuple[str, ...]
    changed: Mapping[str, str]
    num_steps: int

    @property
    def is_equal(self) -> bool:
        """Return whether every number of every step and every byte of the result are equal."""
        return self.first_step is None and not self.differing

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, comparison) rows for a table."""
        steps = "all equal" if self.first_step is None else f"differ from step {self.first_step} on"
        rows = [(f"loss, gradient norm and rate of {self.num_steps} steps", steps)]
        files = "equal byte for byte" if not self.differing else f"differs: {', '.join(self.differing)}"
        rows.append(("result", files))
        for name, then, now in (
            ("training loss", self.before.loss_last, self.after.loss_last),
            ("evaluation loss", self.before.eval_loss_after, self.after.eval_loss_after),
        ):
            if then is not None and now is not None:
                rows.append((name, f"{then:.6f} then, {now:.6f} now"))
        return rows + [(f"{name} changed since", description) for name, description in self.changed.items()]

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def reproduce(
    path: Path,
    *,
    out: Path | None = None,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    observer: Observer = ignore_event,
    train_on_ranks: Callable[..., Summary],
) -> Reproduction:
    """Train the recipe of a finished run again, into a new folder, and compare.

    `train_on_ranks` does it for a run of several processes. Raises UserError where the run is not finished, or is
    damaged.
    """
    run = RunDir.open(path)
    result = _verified_result(run)
    num_ranks = read_plan(run).ranks.num
    train = partial(train_on_ranks, num=num_ranks) if num_ranks > 1 else finetune
    loaded = load_run_recipe(run, recipe, overrides)
    second_summary = train(
        loaded, out=out or next_free_path(path.resolve().with_name(f"{path.resolve().name}-again")), observer=observer
    )
    second_run = RunDir(second_summary.path)
    old_fingerprints, new_fingerprints = (
        read_sealed(one.path / "environment.json")["fingerprints"] for one in (run, second_run)
    )
    step_numbers = [  # of each step, as last repeated; as text, so that NaN equals NaN
        {
            event.step: tuple(repr(event[name]) for name in _COMPARED_FIELDS)
            for event in of_type(one.events(), StepEvent)
        }
        for one in (run, second_run)
    ]
    numbers = sorted(step_numbers[0].keys() | step_numbers[1].keys())
    # weights files that are not the same bytes in two results
    second = _verified_result(second_run)
    hashes = [
        {name: entry["sha256"] for name, entry in read_json(folder / MANIFEST)["files"].items()}
        for folder in (result, second)
    ]
    names = sorted(name for name in hashes[0].keys() | hashes[1].keys() if name.endswith(".safetensors"))
    differing = [name for name in names if hashes[0].get(name) != hashes[1].get(name)]
    return Reproduction(
        before=read_summary(run),
        after=second_summary,
        first_step=next((n for n in numbers if step_numbers[0].get(n) != step_numbers[1].get(n)), None),
        differing=tuple(differing),
        changed=find_changes(old_fingerprints, new_fingerprints),
        num_steps=len(numbers),
    )


def _verified_result(run: RunDir) -> Path:
    """Return the folder of the run's result. Raises UserError where it is missing or damaged."""
    folder = run.adapter if run.adapter.is_dir() else run.model
    if not folder.is_dir():
        fix = f"finish it: peftkit resume {run.path}"
        raise UserError(Problem(str(run.path), "a run without a result", "a finished run", fix))
    if faults := verify_folder(folder):
        raise UserError([Problem(str(folder), fault, "files as peftkit wrote them") for fault in faults])
    return folder
