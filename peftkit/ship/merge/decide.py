"""Plan of a merge, made before any weight is read (adapters, base, every tensor), and its writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.edits import read_edits, refuse_unmergeable
from peftkit.model.adapter.load import ADAPTER_WEIGHTS, resized_vocabulary
from peftkit.model.base.identity import base_identity, changed_parts
from peftkit.model.meta.skeleton import fetch_weights, meta_model, read_base_layout
from peftkit.results.find import Adapter, find_adapter
from peftkit.rundir.events import Observer, PhaseEvent, ProgressEvent, ignore_event
from peftkit.ship.files.folder import copy_model_files
from peftkit.ship.files.tensors import read_all_entries, refuse_non_finite, safetensors_files
from peftkit.ship.merge.combine import Combination, make_combination
from peftkit.ship.merge.plan import plan_merge
from peftkit.ship.merge.write import MergeSources, write_merged
from peftkit.units import show_bytes

DEQUANTIZED, ORIGINAL = "dequantized", "original"
MERGE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge.

    For a base that was held in 4-bit, `base` is dequantized (what was evaluated, and what auto means) or
    original, and `requantize` writes the merged weights in NF4 again. `base_model` is another place of the
    same base, `dtype` the type of all weights, `data` the rows to compare on. Several adapters are combined
    with `weights` (1 each) by sum, ties or dare: ties keeps and dare draws, with a `seed`, a share `density`
    (0.5) of each change.
    """

    base: str = "auto"
    requantize: bool = False
    base_model: str | None = None
    dtype: str | None = None
    data: str | None = None
    weights: tuple[float, ...] | None = None
    combine: str = "sum"
    density: float | None = None
    seed: int | None = None
    force: bool = False

    def problems(self) -> list[Problem]:
        """Return the problems: invalid values, and options without effect."""
        found = []
        if self.base not in {"auto", DEQUANTIZED, ORIGINAL}:
            found.append(Problem("--base", self.base, f"{DEQUANTIZED} or {ORIGINAL}"))
        if self.dtype not in {None, *MERGE_DTYPES}:
            found.append(Problem("--dtype", str(self.dtype), ", ".join(MERGE_DTYPES)))
        if self.density is not None and self.combine not in {"ties", "dare"}:
            found.append(Problem("--density", f"with --combine {self.combine}", "ties or dare", "leave it out"))
        if self.seed is not None and self.combine != "dare":
            found.append(Problem("--seed", f"with --combine {self.combine}", "dare", "leave it out"))
        return found

    def combination(self, num_adapters: int) -> Combination:
        """Return how `num_adapters` adapters are combined. Raises UserError with all problems at once."""
        if problems := self.problems():
            raise UserError(problems)
        density = 0.5 if self.density is None else self.density
        return make_combination(self.weights, num_adapters, how=self.combine, density=density, seed=self.seed or 0)


@dataclass(frozen=True)
class MergeJob:
    """A merge decided before anything is written: adapters, combination, base, and a plan per base."""

    adapters: tuple[Adapter, ...]
    options: MergeOptions
    combination: Combination
    base: str
    base_folder: Path
    tensors: tuple[Any, ...]  # name -> TensorEntry, of each adapter's file
    plans: dict[str, Any]  # choice of base -> MergePlan

    @property
    def is_sum_of_lora(self) -> bool:
        """Return whether PEFT computes the same with all adapters active: a weighted sum of LoRA."""
        edits = [
            edit for output in self.plans[self.base].outputs for weight_edits in output.edits for edit in weight_edits
        ]
        return self.combination.how == "sum" and all(edit.kind == "lora" for edit in edits)


@dataclass(frozen=True)
class AdapterSet:
    """Adapters of one base with their edits, their combination, and the base's parameters.

    `vocabulary_size` is the number of rows of the tables where training resized them.
    """

    adapters: tuple[Adapter, ...]
    how: Combination
    sources: tuple[tuple[Any, Any], ...]  # of each: its edits, and name -> TensorEntry of its file
    vocabulary_size: int | None
    parameters: frozenset[str]


def read_adapter_set(paths: Sequence[Path], options: MergeOptions) -> AdapterSet:
    """Read the adapters at `paths`. Raises UserError, before any weight of the base is read."""
    combination = options.combination(len(paths))
    adapters = tuple(find_adapter(path, base=options.base_model) for path in paths)
    for adapter in adapters:
        refuse_unmergeable(adapter.folder, adapter.config)
    # one base, quantization, task, classes and configuration for all
    first = adapters[0]
    first_identity = base_identity(first.source, first.base)
    for other in adapters[1:]:
        other_identity = base_identity(other.source, other.base)
        if other.source != first.source and (
            changed_parts(first_identity, other_identity)
            or not (first_identity["weights_sha256"] and other_identity["weights_sha256"])
        ):
            got = f"an adapter of {other.base.id}"
            raise UserError(Problem(str(other.folder), got, f"one of {first.base.id}, as the first"))
        for name, first_value, other_value in (
            ("4-bit", first_identity["quantization"], other_identity["quantization"]),
            ("task", first.base.task, other.base.task),
            ("classes", first.base.labels, other.base.labels),
            ("configuration overrides", dict(first.base.overrides), dict(other.base.overrides)),
        ):
            if first_value != other_value:
                got = f"{name}: {other_value or 'none'}"
                raise UserError(Problem(str(other.folder), got, f"{first_value or 'none'}, as the first's"))
    tensors = [read_all_entries([adapter.folder / ADAPTER_WEIGHTS]) for adapter in adapters]
    for file_tensors in tensors:
        refuse_non_finite(file_tensors)
    shapes = [{name: entry.shape for name, entry in file_tensors.items()} for file_tensors in tensors]
    base_model = meta_model(first.source, first.base)
    vocabulary_sizes = [resized_vocabulary(base_model, shape) for shape in shapes]
    if not combination.is_plain and any(vocabulary_sizes):
        index = next(i for i, num_rows in enumerate(vocabulary_sizes) if num_rows)
        got = f"a vocabulary of {vocabulary_sizes[index]:,} tokens, resized in training"
        fix = "merge it alone, with weight 1"
        raise UserError(Problem(str(adapters[index].folder), got, "the vocabulary of the base", fix))
    num_rows, parameters = vocabulary_sizes[0], frozenset(base_model.state_dict())
    edits = [
        read_edits(meta_model(first.source, first.base, vocabulary=num_rows), adapter.folder, shape)
        for adapter, shape in zip(adapters, shapes, strict=True)
    ]
    return AdapterSet(adapters, combination, tuple(zip(edits, tensors, strict=True)), num_rows, parameters)


def plan_merge_inputs(paths: Sequence[Path], options: MergeOptions) -> MergeJob:
    """Choose the base and plan every tensor of a merge without reading a weight of the base.

    For a 4-bit base there is one plan per base (dequantized, original), so that both can be compared. Raises
    UserError for adapters that do not fit together or cannot be merged.
    """
    adapters = read_adapter_set(paths, options)
    first = adapters.adapters[0]
    base = _choose_base(first, options)
    base_folder = fetch_weights(first.source, first.base)
    base_tensors = read_all_entries(safetensors_files(base_folder))
    base_layout = read_base_layout(
        first.source, first.base, base_folder, base_tensors, vocabulary=adapters.vocabulary_size
    )
    if options.requantize and any(len(base_layout.shapes[name]) > 2 for name in base_layout.in_4bit):
        got, fix = "nf4 with fused experts", "leave it out: transformers cannot load fused experts in 4-bit"
        raise UserError(Problem("--requantize", got, "a base whose 4-bit weights are all linear layers", fix))
    dtype = getattr(torch, options.dtype) if options.dtype else None
    choices = [DEQUANTIZED, ORIGINAL] if first.base.quant_type else [base]
    plans = {
        choice: plan_merge(base_tensors, base_layout, adapters.sources, dtype=dtype, dequantized=choice == DEQUANTIZED)
        for choice in dict.fromkeys([base, *choices])
    }
    tensors = tuple(adapter_tensors for _, adapter_tensors in adapters.sources)
    return MergeJob(adapters.adapters, options, adapters.how, base, base_folder, tensors, plans)


def _choose_base(adapter: Adapter, options: MergeOptions) -> str:
    """Choose the base to merge into: the evaluated (dequantized) one, unless the options say otherwise.

    Raises UserError for options that the base cannot follow.
    """
    base = adapter.base
    if adapter.is_4bit_unknown and options.base != ORIGINAL:
        got = "a base that was held in 4-bit, without the 4-bit settings"
        fix = "merge the run that it comes from, or use --base original, a model that was not evaluated"
        raise UserError(
            Problem(str(adapter.folder / "peftkit.json"), got, "which layers, and with which settings", fix)
        )
    if options.requantize and base.quant_type not in {None, "nf4"}:
        got = f"nf4 for a base that was trained in {base.quant_type}"
        raise UserError(Problem("--requantize", got, "a base in nf4", "leave it out"))
    if base.quant_type is None:
        problems = []
        if options.base == DEQUANTIZED:
            fix = "leave out --base"
            problems.append(Problem("--base", "dequantized for a base that was not in 4-bit", ORIGINAL, fix))
        if options.requantize:
            got = "nf4 for a base that was not trained in 4-bit"
            problems.append(Problem("--requantize", got, "a QLoRA adapter", "quantize the merged model"))
        if problems:
            raise UserError(problems)
        return ORIGINAL
    if options.requantize and options.base == DEQUANTIZED:
        got = "nf4 of the dequantized weights: they lie on NF4's grid, so that a small adapter rounds away"
        raise UserError(Problem("--requantize", got, "--base original", "leave out --base dequantized"))
    if options.base != "auto":
        return options.base
    return ORIGINAL if options.requantize else DEQUANTIZED


def write_merge(job: MergeJob, base_choice: str, folder: Path, observer: Observer = ignore_event) -> None:
    """Write weights, configuration and tokenizer files into a folder that exists and is empty."""
    first = job.adapters[0]
    observer(PhaseEvent(name="merge", detail=f"writing {show_bytes(job.plans[base_choice].num_bytes)}"))
    sources = MergeSources(first.base, job.tensors, job.combination, requantize=job.options.requantize)

    def progress(done: int, total: int) -> None:
        observer(ProgressEvent(done_bytes=done, total_bytes=total))

    write_merged(job.plans[base_choice], sources, folder, progress=progress)
    copy_model_files(first.folder, job.base_folder, folder, with_code=first.base.trust_remote_code)
