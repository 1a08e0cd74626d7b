"""Gather what a plan rests on. The light way imports no torch; the full way opens the base and the data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.data.formats import Example
from peftkit.data.rows.examples import Examples, column
from peftkit.data.rows.ingest import read
from peftkit.data.tokens.lengths import at_most, longest
from peftkit.data.tokens.prepare import Prepared
from peftkit.errors import Problem, UserError
from peftkit.model.base.gguf import header_config
from peftkit.model.base.locate import Base, locate
from peftkit.model.base.shape import shape_of_base
from peftkit.model.hardware import detect_device_light
from peftkit.plan import DataFacts, Facts, Lengths, Memory, ModelFacts, Plan, TextFacts
from peftkit.plan.changes import nearest_changes
from peftkit.plan.fit import judge
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.paths import is_data_path
from peftkit.units import show_bytes

_SLACK = 1.05  # the closed form's error


def light_facts(loaded: LoadedRecipe) -> tuple[Facts, Examples | None]:
    """Facts without torch, weights or network where the shapes are known here. Local data is read."""
    recipe = loaded.recipe
    where = loaded.where(("base", "id"))
    base = _shapes(loaded)
    if base.kind == "gguf" and base.path is not None:
        base = replace(base, config=header_config(base.path, where))
    examples = read(loaded) if all(is_data_path(s.path) for s in recipe.data.sources) else None
    try:
        model = model_facts(loaded, base, examples)
    except UserError:
        if base.kind != "gguf":
            raise
        # headers of other architectures name sizes otherwise: the converted folder has a config.json
        from peftkit.model.load import loadable

        model = model_facts(loaded, converted(base, loadable(base, where)), examples)
    return Facts(detect_device_light(), model, data_facts(examples, model.shape.task)), examples


def _shapes(loaded: LoadedRecipe) -> Base:
    """The base as far as shapes need it: a folder without weights will do."""
    recipe, where = loaded.recipe, loaded.where(("base", "id"))
    revision = recipe.base.revision
    return locate(recipe.base.id, revision=revision, where=where, need_weights=False, shapes_alone=True)


def light_config(loaded: LoadedRecipe) -> dict[str, Any]:
    """The base's config.json, without weights or network where it is known here."""
    base, where = _shapes(loaded), loaded.where(("base", "id"))
    if base.config is None and base.path is not None:
        from peftkit.model.load import loadable

        base = converted(base, loadable(base, where))
    return dict(base.config or {})


def model_facts(loaded: LoadedRecipe, base: Base, examples: Examples | None) -> ModelFacts:
    """The base's shape with the head that task and data ask for."""
    shape = shape_of_base(
        base,
        task=loaded.recipe.task,
        data_format=examples.format if examples else None,
        num_labels=len(examples.labels) if examples else 0,
        trust_remote_code=loaded.recipe.base.trust_remote_code,
        revision=loaded.recipe.base.revision,
        where=loaded.where(("base", "id")),
    )
    return ModelFacts(base.id, base.kind, shape)


def find_base(loaded: LoadedRecipe) -> Base:
    """The base with its weights at hand, or a UserError that says why not."""
    recipe = loaded.recipe
    return locate(recipe.base.id, revision=recipe.base.revision, where=loaded.where(("base", "id")))


def converted(base: Base, source: str) -> Base:
    """The base as it will be loaded: with the converted folder's configuration where there is one."""
    config_file = Path(source) / "config.json"
    if not config_file.is_file():
        return base
    return replace(base, path=Path(source), config=json.loads(config_file.read_text(encoding="utf-8")))


def data_facts(examples: Examples | None, task: str) -> DataFacts | None:
    """Row counts of examples as they were read, and bounds of their lengths."""
    if examples is None:
        return None
    lengths = _bounds(examples.train, task)
    return DataFacts(
        len(examples.train),
        len(examples.eval),
        examples.format,
        examples.labels,
        lengths,
        longest(_bounds(examples.eval, task)),
        weighted=examples.weighted,
    )


def _bounds(rows: Sequence[Example], task: str) -> Lengths | None:
    """How long rows are at most, from their bytes."""
    return at_most(column(rows, "asked"), column(rows, "answered"), task)


def text_facts(tokenizer: Any, prepared: Prepared) -> TextFacts:
    """What the tokenizer settled: template, spans, padding, and how answers end."""
    from peftkit.model.load import pad_policy

    pad, why = pad_policy(tokenizer)
    style = prepared.style
    ends = tuple(tokenizer.convert_ids_to_tokens([token for token, _ in prepared.seen.ends[:3]]))
    return TextFacts(style.source, style.marked is not None, style.reason, pad, why, ends)


def memory_problems(
    loaded: LoadedRecipe, plan: Plan, facts: Facts, *, slack: float = _SLACK
) -> list[Problem]:
    """What shows already that the run cannot start: it needs more than the device has free.

    Where activations are only a bound, what lies there before a step has to exceed it.
    """
    memory = plan.memory
    assert memory is not None
    fit = judge(memory, facts.device)
    if fit.verdict != "does not fit":
        return []
    needed = fit.needed_bytes
    if memory.bound:
        needed = next(p.allocated_bytes for p in memory.peaks if p.phase == "optimizer step")
    if needed <= fit.free_bytes * slack:
        return []
    changes = nearest_changes(loaded, facts, plan)
    told = [f"{' '.join(change.overrides)} ({show_bytes(change.needed_bytes)})" for change in changes]
    return [
        Problem(
            "device",
            f"{facts.device.name} with {show_bytes(fit.free_bytes)} free",
            f"{show_bytes(needed)} for {largest_part(memory)} and the rest",
            f"what fits: {'; '.join(told)}" if told else "use a smaller base or a larger device",
        )
    ]


def largest_part(memory: Memory) -> str:
    """The largest component at the peak."""
    return max(memory.peak.components, key=lambda name: memory.peak.components[name])


def refuse_where_it_cannot_run(loaded: LoadedRecipe, plan: Plan, facts: Facts) -> Base:
    """The base, ready to load. Raises UserError with all that stands in the way, within a second or two."""
    problems = memory_problems(loaded, plan, facts)
    base = None
    try:
        base = find_base(loaded)
    except UserError as error:
        problems.extend(error.problems)
        big = plan.method.num_parameters > 1_000_000_000
        if facts.device.kind == "cpu" and big:
            problems.append(
                Problem(
                    "device",
                    "no CUDA GPU",
                    "a GPU for a model of this size",
                    "on a CPU it would take days even with the weights at hand",
                )
            )
    if problems or base is None:
        raise UserError(problems)
    return base
