"""The next recipe, written beside the run: the run's recipe with the verdict's changes and their reasons."""

from __future__ import annotations

from pathlib import Path

from peftkit.diagnose.verdict import Verdict
from peftkit.recipe import LoadedRecipe, load
from peftkit.recipe.document import dump_text
from peftkit.rundir import write_text
from peftkit.secrets import redact


def write_next_recipe(path: Path, loaded: LoadedRecipe, verdict: Verdict) -> None:
    """Write the next recipe for `peftkit finetune`. Raises UserError for changes the recipe forbids."""
    write_text(path, render_next_recipe(loaded, verdict))


def render_next_recipe(loaded: LoadedRecipe, verdict: Verdict) -> str:
    """Render the next recipe as YAML, with the verdict above and the old value beside each changed line."""
    overrides = verdict.action.overrides
    updated = load(loaded.recipe, list(overrides))
    before = loaded.recipe.model_dump(mode="json", exclude_unset=True)
    after = updated.recipe.model_dump(mode="json", exclude_unset=True)
    if "max_steps" in after.get("train", {}) and "train.max_steps" in " ".join(overrides):
        after["train"].pop("epochs", None)  # the one overrules the other
    lines = dump_text(after).splitlines()
    paths = [text.split("=", 1)[0].partition(".") for text in overrides]
    for section, name in dict.fromkeys((section, key or "name") for section, _, key in paths):  # method=lora: its name
        line_number, old_section = _find_key_line(lines, section, name), before.get(section)
        if line_number is not None:
            old_value = old_section.get(name, "the default") if isinstance(old_section, dict) else "the default"
            lines[line_number] += f"  # was {old_value}: {verdict.cause}"
    header = [f"# {verdict.line}", f"# {verdict.action.said}"]
    if verdict.action.gain is not None:
        header.append(f"# expected gain: {verdict.action.gain} nats on rows that were not used to decide")
    return redact("\n".join([*(line.replace("\n", " ") for line in header), *lines]) + "\n")


def _find_key_line(lines: list[str], section: str, name: str) -> int | None:
    """Return the line number of a key in a section of block-style YAML; None if absent."""
    in_section = False
    for number, line in enumerate(lines):
        if not line.startswith(" ") and not line.startswith("-"):
            in_section = line.startswith(f"{section}:")
        elif in_section and line.startswith(f"  {name}:"):
            return number
    return None
