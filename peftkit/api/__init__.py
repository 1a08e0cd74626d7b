"""The Python functions: each takes a path, a dict or a `Recipe`; the command line only calls these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.plan import Plan
from peftkit.recipe import LoadedRecipe, Recipe, load
from peftkit.report import Summary, read_summary
from peftkit.rundir import RunDir

RecipeLike = str | Path | Mapping[str, Any] | Recipe | LoadedRecipe
Observer = Callable[[dict[str, Any]], None]


def _ignore(event: dict[str, Any]) -> None:
    """The observer of those who want none."""


def load_recipe(source: RecipeLike, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and validate a recipe: a file, a shipped recipe's name, a dict, or a `Recipe`.

    `overrides` are dotted key=value texts, typed as in YAML. Raises UserError with every problem found.
    """
    if not isinstance(source, LoadedRecipe):
        return load(source, overrides)
    return load(source.recipe, overrides) if overrides else source


def make_plan(source: RecipeLike, overrides: Sequence[str] = ()) -> Plan:
    """Everything that would be decided, with reasons, without torch, weights or network where possible."""
    from peftkit.run import dry_run

    return dry_run(load_recipe(source, overrides))


def finetune(
    source: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    observer: Observer = _ignore,
) -> Summary:
    """Train what a recipe describes into a fresh run directory. Returns the run's summary.

    `observer` is called with every event as it is written. Raises UserError for the user's to mend.
    """
    from peftkit import run

    return run.finetune(load_recipe(source, overrides), out=Path(out) if out else None, observer=observer)


def resume_run(path: str | Path, *, observer: Observer = _ignore) -> Summary:
    """Go on with an interrupted run from its newest checkpoint that verifies."""
    from peftkit import run

    return run.resume(Path(path), observer=observer)


def summarize_run(path: str | Path) -> Summary:
    """The outcome of a run, finished or not, in numbers. Imports no torch."""
    return read_summary(RunDir.open(Path(path)))


def generate(path: str | Path, prompts: Sequence[str], *, max_new_tokens: int = 128) -> list[str]:
    """Greedy answers of a finished run's model, one per prompt, asked as user turns of a chat."""
    from peftkit.run.answer import answer

    return answer(Path(path), prompts, max_new_tokens=max_new_tokens)
