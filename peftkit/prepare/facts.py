"""Facts that a plan is based on. The light way imports no torch; the full way opens the base and the data."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import ranks
from peftkit.archs.held import held_format, way_out
from peftkit.data.formats import Example
from peftkit.data.rows.examples import Examples, row_statistic
from peftkit.data.rows.ingest import read_examples
from peftkit.data.tokens.lengths import bound_lengths, longest_sides
from peftkit.data.tokens.prepare import TokenizedData
from peftkit.errors import Problem, UserError
from peftkit.model.base.dequantize import plain_config
from peftkit.model.base.gguf import read_header_config
from peftkit.model.base.locate import LocatedBase, locate_base
from peftkit.model.base.shape import infer_base_shape
from peftkit.model.hardware import count_gpus, detect_device_without_torch
from peftkit.model.load import explain_pad_token
from peftkit.plan import DataFacts, Facts, Lengths, Memory, ModelFacts, Plan, TextFacts
from peftkit.plan.changes import nearest_changes
from peftkit.plan.fit import check_fit
from peftkit.plan.parallel import shared_device
from peftkit.plan.schedule import SCHEDULE_FREE
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.paths import is_data_path
from peftkit.units import show_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOSED_FORM_ERROR = 1.05  # the closed form's error


def light_facts(loaded: LoadedRecipe) -> tuple[Facts, Examples | None]:
    """Gather facts without torch, weights or network where the shapes are known. Local data is read."""
    recipe = loaded.recipe
    where = loaded.where(("base", "id"))
    base = _locate_for_shapes(loaded)
    if base.kind == "gguf" and base.path is not None:
        base = replace(base, config=read_header_config(base.path, where))
    held = held_format(base.config or {})
    base = replace(base, config=plain_config(base.config)) if base.config is not None else base
    if held is not None and not (recipe.base.dequantize and held.undone_by):
        model_facts(loaded, base, None)  # what is no text model is refused for that: dequantizing would not help
        got = f"{base.id}, whose weights are held as {held.name}"
        raise UserError(Problem(where, got, "weights that are not quantized", way_out(base.id, held)))
    if recipe.base.dequantize and recipe.base.trust_remote_code:
        got, fix = "true with base.trust_remote_code", "set base.dequantize: false, and take the unquantized model"
        raise UserError(Problem(loaded.where(("base", "dequantize")), got, "a model that transformers has", fix))
    if held is None and recipe.base.dequantize:
        got, key = f"true, and the weights of {base.id} are not quantized", ("base", "dequantize")
        raise UserError(Problem(loaded.where(key), got, "a quantized checkpoint", "set base.dequantize: false"))
    examples = read_examples(loaded) if all(is_data_path(s.path) for s in recipe.data.sources) else None
    try:
        model = model_facts(loaded, base, examples)
    except UserError:
        if base.kind != "gguf":
            raise
        # headers of other architectures name sizes otherwise: the converted folder has a config.json
        from peftkit.model.load import resolve_source

        model = model_facts(loaded, with_converted_config(base, resolve_source(base, where)), examples)
    facts = Facts(detect_device_without_torch(), model, data_facts(examples, model.shape.task))
    return with_ranks(loaded, facts), examples


def with_ranks(loaded: LoadedRecipe, facts: Facts) -> Facts:
    """Return the facts with what is known of the processes that train together."""
    launched, count = ranks.launched().num, loaded.recipe.devices.count
    num = launched if count == "auto" else count
    num_devices = count_gpus() if num > 1 else None
    return replace(facts, device=shared_device(facts.device, num), num_ranks=launched, num_devices=num_devices)


def _locate_for_shapes(loaded: LoadedRecipe) -> LocatedBase:
    """Locate the base for its shapes alone: a folder without weights is enough."""
    recipe, where = loaded.recipe, loaded.where(("base", "id"))
    revision = recipe.base.revision
    return locate_base(recipe.base.id, revision=revision, where=where, need_weights=False, shapes_alone=True)


def light_config(loaded: LoadedRecipe) -> dict[str, Any]:
    """Return the base's config.json, without weights, and without network where it is known locally."""
    base, where = _locate_for_shapes(loaded), loaded.where(("base", "id"))
    if base.config is None and base.path is not None:
        from peftkit.model.load import resolve_source

        base = with_converted_config(base, resolve_source(base, where))
    return plain_config(base.config or {})


def model_facts(loaded: LoadedRecipe, base: LocatedBase, examples: Examples | None) -> ModelFacts:
    """Return the shape of the base with the head that task and data need."""
    shape = infer_base_shape(
        base,
        task=loaded.recipe.task,
        data_format=examples.format if examples else None,
        num_labels=len(examples.labels) if examples else 0,
        trust_remote_code=loaded.recipe.base.trust_remote_code,
        revision=loaded.recipe.base.revision,
        where=loaded.where(("base", "id")),
    )
    return ModelFacts(base.id, base.kind, shape)


def find_base(loaded: LoadedRecipe) -> LocatedBase:
    """Locate the base with its weights. Raises UserError where they are not available."""
    recipe = loaded.recipe
    return locate_base(recipe.base.id, revision=recipe.base.revision, where=loaded.where(("base", "id")))


def with_converted_config(base: LocatedBase, source: str) -> LocatedBase:
    """Return the base as it will be loaded: with the configuration of the converted folder, if any."""
    config_file = Path(source) / "config.json"
    if not config_file.is_file():
        return base
    return replace(base, path=Path(source), config=json.loads(config_file.read_text(encoding="utf-8")))


def data_facts(examples: Examples | None, task: str) -> DataFacts | None:
    """Return row counts of examples before tokenizing, and upper bounds of their lengths."""
    if examples is None:
        return None
    lengths = _length_bounds(examples.train, task)
    return DataFacts(
        len(examples.train),
        len(examples.eval),
        examples.format,
        examples.labels,
        lengths,
        longest_sides(_length_bounds(examples.eval, task)),
        weighted=examples.weighted,
        unused=tuple(examples.unused),
    )


def _length_bounds(rows: Sequence[Example], task: str) -> Lengths | None:
    """Return upper bounds of row lengths in tokens, from their bytes."""
    return bound_lengths(row_statistic(rows, "asked"), row_statistic(rows, "answered"), task)


def text_facts(tokenizer: PreTrainedTokenizerBase, prepared: TokenizedData) -> TextFacts:
    """Return what the tokenizer decided: template, spans, padding, and the tokens that end answers."""
    pad, pad_reason = explain_pad_token(tokenizer)
    style = prepared.style
    ends = tuple(tokenizer.convert_ids_to_tokens([token for token, _ in prepared.seen.ends[:3]]))
    return TextFacts(style.source, style.marked is not None, style.reason, pad, pad_reason, ends)


def memory_problems(
    loaded: LoadedRecipe, plan: Plan, facts: Facts, *, slack: float = _CLOSED_FORM_ERROR
) -> list[Problem]:
    """Return the problems that show now that the run cannot start: it needs more than the device has free.

    Where activations are only a bound, the bytes allocated before a step have to exceed the free memory.
    `slack` is the factor by which the prediction may be off.
    """
    memory = plan.memory
    assert memory is not None
    fit = check_fit(memory, facts.device)
    if fit.verdict != "does not fit":
        return []
    needed = fit.needed_bytes
    if memory.bound:
        needed = next(p.allocated_bytes for p in memory.peaks if p.phase == "optimizer step")
    if needed <= fit.free_bytes * slack:
        return []
    changes = nearest_changes(loaded, facts, plan)
    alternatives = [f"{' '.join(change.overrides)} ({show_bytes(change.needed_bytes)})" for change in changes]
    return [
        Problem(
            "device",
            f"{facts.device.name} with {show_bytes(fit.free_bytes)} free",
            f"{show_bytes(needed)} for {largest_component(memory)} and the rest",
            f"what fits: {'; '.join(alternatives)}" if alternatives else "use a smaller base or a larger device",
        )
    ]


def largest_component(memory: Memory) -> str:
    """Return the name of the largest component at the peak."""
    return max(memory.peak.components, key=lambda name: memory.peak.components[name])


def require_runnable(loaded: LoadedRecipe, plan: Plan, facts: Facts) -> LocatedBase:
    """Return the base, ready to load. Raises UserError with all problems, within a second or two."""
    problems = memory_problems(loaded, plan, facts)
    base = None
    try:
        base = find_base(loaded)
    except UserError as error:
        problems.extend(error.problems)
        is_large = plan.method.num_parameters > 1_000_000_000
        if facts.device.kind == "cpu" and is_large:
            problems.append(
                Problem(
                    "device",
                    "no CUDA GPU",
                    "a GPU for a model of this size",
                    "on a CPU it would take days even with the weights downloaded",
                )
            )
    if plan.train.optimizer == SCHEDULE_FREE and importlib.util.find_spec("schedulefree") is None:
        got, fix = f"{SCHEDULE_FREE} without schedulefree", "pip install 'peftkit[schedule-free]'"
        problems.append(Problem(loaded.where(("train", "optimizer")), got, "it installed", fix))
    if problems or base is None:
        raise UserError(problems)
    return base
