"""Run a finished run again and compare: the same numbers, or the first step from which on they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.prepare.context import Observer
from peftkit.report import Summary, read_summary
from peftkit.run.finetune import finetune
from peftkit.run.resume import changes, recipe_of
from peftkit.rundir import MANIFEST, RunDir, read_json, read_sealed, verify_folder
from peftkit.units import html_table

_NUMBERS = ("loss", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class Reproduction:
    """A run beside the one that was made again from its recipe.

    `first_step` is the first at which a number differs (None where none does), `differing` the files of the
    result that do, `changed` what was not as it was then.
    """

    before: Summary
    after: Summary
    first_step: int | None
    differing: tuple[str, ...]
    changed: Mapping[str, str]
    num_steps: int

    @property
    def is_equal(self) -> bool:
        """Every number of every step, and every byte of the result."""
        return self.first_step is None and not self.differing

    def rows(self) -> list[tuple[str, str]]:
        """(what, how it compares)."""
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
        return rows + [(f"{name} changed since", said) for name, said in self.changed.items()]

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def reproduce(
    path: Path,
    *,
    out: Path | None = None,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    observer: Observer = lambda event: None,
) -> Reproduction:
    """Train what a finished run trained once more, into a new folder, and compare.

    Raises UserError where the run is not finished, or is damaged.
    """
    run = RunDir.open(path)
    result = _result(run)
    loaded = recipe_of(run, recipe, overrides)
    after = finetune(loaded, out=out or _beside(path), observer=observer)
    again = RunDir(after.path)
    then, now = (read_sealed(one.path / "environment.json")["fingerprints"] for one in (run, again))
    steps = [_steps(one) for one in (run, again)]
    numbers = sorted(steps[0].keys() | steps[1].keys())
    return Reproduction(
        before=read_summary(run),
        after=after,
        first_step=next((n for n in numbers if steps[0].get(n) != steps[1].get(n)), None),
        differing=tuple(_differing(result, _result(again))),
        changed=changes(then, now),
        num_steps=len(numbers),
    )


def _beside(path: Path) -> Path:
    """RUN-again, or RUN-again-2 and so on where that is taken."""
    candidate, number = path.resolve().with_name(f"{path.resolve().name}-again"), 1
    while candidate.exists():
        number += 1
        candidate = candidate.with_name(f"{path.resolve().name}-again-{number}")
    return candidate


def _result(run: RunDir) -> Path:
    """The run's result. Raises UserError where there is none, or where it is damaged."""
    folder = run.adapter if run.adapter.is_dir() else run.model
    if not folder.is_dir():
        fix = f"go on with it: peftkit resume {run.path}"
        raise UserError(Problem(str(run.path), "a run without a result", "a finished run", fix))
    if faults := verify_folder(folder):
        raise UserError([Problem(str(folder), fault, "files as peftkit wrote them") for fault in faults])
    return folder


def _steps(run: RunDir) -> dict[int, tuple[Any, ...]]:
    """Step -> its numbers, of the last time that it was made; texts, so that NaN equals NaN."""
    events = [event for event in run.events() if event["event"] == "step"]
    return {event["step"]: tuple(repr(event[name]) for name in _NUMBERS) for event in events}


def _differing(first: Path, second: Path) -> list[str]:
    """Weights files that are not the same bytes in two results."""
    hashes = [
        {name: entry["sha256"] for name, entry in read_json(folder / MANIFEST)["files"].items()}
        for folder in (first, second)
    ]
    names = sorted(name for name in hashes[0].keys() | hashes[1].keys() if name.endswith(".safetensors"))
    return [name for name in names if hashes[0].get(name) != hashes[1].get(name)]
