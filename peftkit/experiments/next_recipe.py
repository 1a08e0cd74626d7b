"""The next recipe, written beside the run: the run's own with what the verdict changes, and why."""

from __future__ import annotations

from pathlib import Path

from peftkit.diagnose.verdict import Verdict
from peftkit.recipe import LoadedRecipe, load
from peftkit.recipe.document import dump_text
from peftkit.rundir import write_text
from peftkit.secrets import redact


def write_next_recipe(path: Path, loaded: LoadedRecipe, verdict: Verdict) -> None:
    """Write it, ready for `peftkit finetune`. Raises UserError for changes that the recipe forbids."""
    write_text(path, next_recipe(loaded, verdict))


def next_recipe(loaded: LoadedRecipe, verdict: Verdict) -> str:
    """The recipe as YAML; above it what was found, beside each changed line what stood there and why."""
    overrides = verdict.action.overrides
    changed = load(loaded.recipe, list(overrides))
    before = loaded.recipe.model_dump(mode="json", exclude_unset=True)
    after = changed.recipe.model_dump(mode="json", exclude_unset=True)
    if "max_steps" in after.get("train", {}) and "train.max_steps" in " ".join(overrides):
        after["train"].pop("epochs", None)  # the one overrules the other
    lines = dump_text(after).splitlines()
    for section, name in dict.fromkeys(_key(text) for text in overrides):
        place, was = _line_of(lines, section, name), before.get(section)
        if place is not None:
            old = was.get(name, "the default") if isinstance(was, dict) else "the default"
            lines[place] += f"  # was {old}: {verdict.cause}"
    head = [f"# {verdict.line}", f"# {verdict.action.said}"]
    if verdict.action.gain is not None:
        head.append(f"# expected gain: {verdict.action.gain} nats on rows that decided nothing")
    return redact("\n".join([*(line.replace("\n", " ") for line in head), *lines]) + "\n")


def _key(override: str) -> tuple[str, str]:
    """The section and name that an override sets; `method=lora` is method.name."""
    section, _, name = override.split("=", 1)[0].partition(".")
    return section, name or "name"


def _line_of(lines: list[str], section: str, name: str) -> int | None:
    """The line of a key of a section, in block style."""
    inside = False
    for number, line in enumerate(lines):
        if not line.startswith(" ") and not line.startswith("-"):
            inside = line.startswith(f"{section}:")
        elif inside and line.startswith(f"  {name}:"):
            return number
    return None
