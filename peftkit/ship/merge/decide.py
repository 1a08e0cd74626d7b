"""What a merge will be, decided before a weight is read: adapters, base, every tensor; and its writing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.results.find import Adapter, find_adapter
from peftkit.ship.merge.combine import Combination, combination
from peftkit.units import show_bytes

Observer = Callable[[dict[str, Any]], None]
DEQUANTIZED, ORIGINAL = "dequantized", "original"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    For a base that was held in 4-bit `base` is dequantized (what was evaluated, and what auto means) or
    original, and `requantize` writes the sum in NF4 again. `base_model` is another place of the same base,
    `dtype` the type of all weights, `data` what to compare on. Several adapters are combined with `weights`
    (1 each) by sum, ties or dare: of these two the first keeps, and the second draws with a `seed`, a share
    `density` (0.5).
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
        """Values that are none, and options without effect."""
        found = []
        if self.base not in {"auto", DEQUANTIZED, ORIGINAL}:
            found.append(Problem("--base", self.base, f"{DEQUANTIZED} or {ORIGINAL}"))
        if self.dtype not in {None, *DTYPES}:
            found.append(Problem("--dtype", str(self.dtype), ", ".join(DTYPES)))
        if self.density is not None and self.combine not in {"ties", "dare"}:
            found.append(
                Problem("--density", f"with --combine {self.combine}", "ties or dare", "leave it out")
            )
        if self.seed is not None and self.combine != "dare":
            found.append(Problem("--seed", f"with --combine {self.combine}", "dare", "leave it out"))
        return found

    def combination(self, num: int) -> Combination:
        """How so many adapters become one. Raises UserError, all at once."""
        if problems := self.problems():
            raise UserError(problems)
        density = 0.5 if self.density is None else self.density
        return combination(self.weights, num, how=self.combine, density=density, seed=self.seed or 0)


@dataclass(frozen=True)
class Work:
    """What is decided before anything is written."""

    adapters: tuple[Adapter, ...]
    options: MergeOptions
    combination: Combination
    base: str
    base_folder: Path
    tensors: tuple[Any, ...]  # name -> Entry, of each adapter's file
    plans: dict[str, Any]  # choice of base -> MergePlan

    @property
    def is_sum_of_lora(self) -> bool:
        """Whether PEFT computes the same with all adapters active: LoRA of weights, added up."""
        edits = [edit for o in self.plans[self.base].outputs for own in o.edits for edit in own]
        return self.combination.how == "sum" and all(edit.kind == "lora" for edit in edits)


@dataclass(frozen=True)
class Adapters:
    """Adapters of one base with their edits, how they become one, and the base's parameters.

    `vocabulary` is the number of rows of the tables where training resized them.
    """

    found: tuple[Adapter, ...]
    how: Combination
    sources: tuple[tuple[Any, Any], ...]  # of each: its edits, and name -> Entry of its file
    vocabulary: int | None
    parameters: frozenset[str]


def adapters_of(paths: Sequence[Path], options: MergeOptions) -> Adapters:
    """The adapters at these paths. Raises UserError, before any weight of the base is looked at."""
    from peftkit.model.adapter.edits import edits_of, refuse_unmergeable
    from peftkit.model.adapter.load import WEIGHTS, vocabulary_of
    from peftkit.model.meta.skeleton import blank
    from peftkit.ship.files.tensors import read_all, refuse_non_finite

    how = options.combination(len(paths))
    adapters = tuple(find_adapter(path, base=options.base_model) for path in paths)
    for adapter in adapters:
        refuse_unmergeable(adapter.folder, adapter.config)
    _refuse_unlike(adapters)
    first, tensors = adapters[0], [read_all([adapter.folder / WEIGHTS]) for adapter in adapters]
    for found in tensors:
        refuse_non_finite(found)
    shapes = [{name: entry.shape for name, entry in found.items()} for found in tensors]
    model = blank(first.source, first.base)
    resized = [vocabulary_of(model, shape) for shape in shapes]
    if not how.is_plain and any(resized):
        number = next(i for i, rows in enumerate(resized) if rows)
        got = f"a vocabulary of {resized[number]:,} tokens, resized in training"
        fix = "merge it alone, with weight 1"
        raise UserError(Problem(str(adapters[number].folder), got, "tables of the base's size", fix))
    rows, parameters = resized[0], frozenset(model.state_dict())
    edits = [
        edits_of(blank(first.source, first.base, vocabulary=rows), adapter.folder, shape)
        for adapter, shape in zip(adapters, shapes, strict=True)
    ]
    return Adapters(adapters, how, tuple(zip(edits, tensors, strict=True)), rows, parameters)


def decided(paths: Sequence[Path], options: MergeOptions) -> Work:
    """Everything that can be known without reading a weight."""
    import torch

    from peftkit.model.meta.skeleton import skeleton, weights_folder
    from peftkit.ship.files.tensors import read_all, weight_files
    from peftkit.ship.merge.plan import plan_merge

    adapters = adapters_of(paths, options)
    first = adapters.found[0]
    base = _base_for(first, options)
    folder = weights_folder(first.source, first.base)
    weights = read_all(weight_files(folder))
    bones = skeleton(first.source, first.base, folder, weights, vocabulary=adapters.vocabulary)
    if options.requantize and any(len(bones.shapes[name]) > 2 for name in bones.in_4bit):
        got, fix = "nf4, of fused experts", "leave it out: transformers cannot load these in 4-bit"
        raise UserError(Problem("--requantize", got, "layers alone in 4-bit", fix))
    dtype = getattr(torch, options.dtype) if options.dtype else None
    choices = [DEQUANTIZED, ORIGINAL] if first.base.quant_type else [base]
    plans = {
        choice: plan_merge(weights, bones, adapters.sources, dtype=dtype, dequantized=choice == DEQUANTIZED)
        for choice in dict.fromkeys([base, *choices])
    }
    tensors = tuple(files for _, files in adapters.sources)
    return Work(adapters.found, options, adapters.how, base, folder, tensors, plans)


def _base_for(adapter: Adapter, options: MergeOptions) -> str:
    """Which base is merged into: what was evaluated, unless the user says otherwise."""
    base = adapter.base
    if adapter.is_4bit_unknown and options.base != ORIGINAL:
        got = "a base that was held in 4-bit, and not how"
        fix = "merge the run that it is from, or take --base original, another model than was evaluated"
        raise UserError(Problem(str(adapter.folder / "peftkit.json"), got, "which layers, and how", fix))
    if options.requantize and base.quant_type not in {None, "nf4"}:
        got = f"nf4, of a base that was trained in {base.quant_type}"
        raise UserError(Problem("--requantize", got, "a base in nf4", "leave it out"))
    if base.quant_type is None:
        problems = []
        if options.base == DEQUANTIZED:
            fix = "leave out --base"
            problems.append(Problem("--base", "dequantized, of a base that was not in 4-bit", ORIGINAL, fix))
        if options.requantize:
            got = "nf4, of a base that was not trained in 4-bit"
            problems.append(Problem("--requantize", got, "a QLoRA adapter", "quantize the merged model"))
        if problems:
            raise UserError(problems)
        return ORIGINAL
    if options.requantize and options.base == DEQUANTIZED:
        got = (
            "nf4 of the dequantized weights: they stand on the grid's points, and a light adapter rounds away"
        )
        raise UserError(Problem("--requantize", got, "--base original", "leave out --base dequantized"))
    if options.base != "auto":
        return options.base
    return ORIGINAL if options.requantize else DEQUANTIZED


def _refuse_unlike(adapters: Sequence[Adapter]) -> None:
    """Raises UserError where adapters are of different bases, or held them differently."""
    from peftkit.model.base.identity import base_identity, differences

    first = adapters[0]
    one = base_identity(first.source, first.base)
    for other in adapters[1:]:
        two = base_identity(other.source, other.base)
        if other.source != first.source and (
            differences(one, two) or not (one["weights_sha256"] and two["weights_sha256"])
        ):
            got = f"an adapter of {other.base.id}"
            raise UserError(Problem(str(other.folder), got, f"one of {first.base.id}, as the first"))
        for what, mine, its in (
            ("4-bit", one["quantization"], two["quantization"]),
            ("task", first.base.task, other.base.task),
            ("classes", first.base.labels, other.base.labels),
            ("changes of the configuration", dict(first.base.overrides), dict(other.base.overrides)),
        ):
            if mine != its:
                got = f"{what}: {its or 'none'}"
                raise UserError(Problem(str(other.folder), got, f"{mine or 'none'}, as the first's"))


def write(work: Work, base: str, folder: Path, observer: Observer = lambda event: None) -> None:
    """Weights, configuration and what stands beside them, into a folder that is there and empty."""
    from peftkit.ship.files.folder import copy_beside
    from peftkit.ship.merge.write import Sources, write_merged

    first = work.adapters[0]
    observer(
        {"event": "phase", "name": "merge", "detail": f"writing {show_bytes(work.plans[base].num_bytes)}"}
    )
    sources = Sources(first.base, work.tensors, work.combination, requantize=work.options.requantize)

    def progress(done: int, total: int) -> None:
        observer({"event": "progress", "done_bytes": done, "total_bytes": total})

    write_merged(work.plans[base], sources, folder, progress=progress)
    copy_beside(first.folder, work.base_folder, folder, with_code=first.base.trust_remote_code)
