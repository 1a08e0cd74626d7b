"""Merge: a folder of dense weights from a base and adapters, published only when it was shown to be right."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.data.mask import Tokenized
from peftkit.diagnose.paired import Interval, Rows, gain
from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.plan.plan import BasePlan
from peftkit.recipe.paths import shown
from peftkit.run.adapter import Adapter, find_adapter
from peftkit.run.card import write_card
from peftkit.run.result import Result, load_result
from peftkit.rundir import is_full, publish_folder, refuse_without_room, write_json
from peftkit.rundir.files import TEMPORARY
from peftkit.ship.combine import Combination, combination
from peftkit.ship.report import REPORT, Choice, MergeReport
from peftkit.units import show_bytes

Observer = Callable[[dict[str, Any]], None]
_MOST_ROWS = 200  # of held-out rows that a loss is measured on
_SPARE_BYTES = 2**26  # tokenizer, configuration, and what a disk keeps for itself
DEQUANTIZED, ORIGINAL = "dequantized", "original"


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    For a base that was held in 4-bit `base` is dequantized (what was evaluated, and what auto means) or
    original, and `requantize` writes the sum in NF4 again. `base_model` is another place of the same base,
    `dtype` the type of all weights, `data` what to compare on. Several adapters are combined with `weights`
    (1 each) by sum, ties or dare: of these two the first keeps, and the second draws, a share `density`.
    """

    base: str = "auto"
    requantize: bool = False
    base_model: str | None = None
    dtype: str | None = None
    data: str | None = None
    weights: tuple[float, ...] | None = None
    combine: str = "sum"
    density: float = 0.5
    seed: int = 0
    force: bool = False


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


def merge(
    paths: Sequence[Path],
    out: Path,
    options: MergeOptions,
    *,
    observer: Observer = lambda event: None,
) -> MergeReport:
    """Write the dense model of adapters and their base into `out`, and say how true it is.

    Raises UserError for what is the user's to mend, before anything is written where it can be known, and
    PeftkitError where the written model is not what was trained, unless `force` was wanted. Then, and after
    an interruption, nothing is left in `out`.
    """
    _refuse_out(out, observer)
    with interrupt.listening():
        work = decided(paths, options)
        compared = [work.base]
        rows = _Rows.of(work, paths[0], observer)
        if work.adapters[0].base.quant_type is not None and rows.judged and len(work.plans) > 1:
            compared = list(work.plans)
        needed = sum(work.plans[base].num_bytes for base in compared) + _SPARE_BYTES
        refuse_without_room(out, needed, what="the merged model", fix="make room, or choose another --out")
        with _room_told(out, needed):
            return _published(work, paths[0], out, compared, rows, observer)


def _refuse_out(out: Path, observer: Observer) -> None:
    """Raises UserError for a place that holds something; tells of what a killed merge left."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        got = "a folder that is not empty" if out.is_dir() else "a file"
        raise UserError(Problem(str(out), got, "a new or empty folder", "choose another --out"))
    for left in sorted(out.parent.glob(f"{TEMPORARY}{out.name}-*")) if out.parent.is_dir() else ():
        size = show_bytes(sum(path.stat().st_size for path in left.rglob("*") if path.is_file()))
        observer(
            {"event": "notice", "text": f"left by a merge that was killed, safe to remove: {left} ({size})"}
        )


@contextmanager
def _room_told(out: Path, needed: int) -> Iterator[None]:
    """A full disk as the user's to mend, with how much is needed."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        got = f"a disk that is full ({error.strerror or error})"
        fix = "make room, or choose another --out; nothing half-written is left"
        raise UserError(Problem(str(out), got, f"{show_bytes(needed)} free", fix)) from error


def decided(paths: Sequence[Path], options: MergeOptions) -> Work:
    """Everything that can be known without reading a weight."""
    import torch

    from peftkit.model.edits import edits_of, refuse_unmergeable
    from peftkit.model.saved import WEIGHTS, vocabulary_of
    from peftkit.model.skeleton import blank, skeleton, weights_folder
    from peftkit.ship.plan import plan_merge
    from peftkit.ship.tensors import read_all, weight_files

    o = options
    how = combination(o.weights, len(paths), how=o.combine, density=o.density, seed=o.seed)
    adapters = tuple(find_adapter(path, base=o.base_model) for path in paths)
    for adapter in adapters:
        refuse_unmergeable(adapter.folder, adapter.config)
    _refuse_unlike(adapters)
    first = adapters[0]
    base = _base_for(first.base, options)
    folder = weights_folder(first.source, first.base)
    weights = read_all(weight_files(folder))
    tensors = tuple(read_all([adapter.folder / WEIGHTS]) for adapter in adapters)
    shapes = [{name: entry.shape for name, entry in found.items()} for found in tensors]
    rows = vocabulary_of(blank(first.source, first.base), shapes[0])
    bones = skeleton(first.source, first.base, folder, weights, vocabulary=rows)
    edits = [
        edits_of(blank(first.source, first.base, vocabulary=rows), adapter.folder, shape)
        for adapter, shape in zip(adapters, shapes, strict=True)
    ]
    dtype = getattr(torch, options.dtype) if options.dtype else None
    pairs = list(zip(edits, tensors, strict=True))
    choices = [DEQUANTIZED, ORIGINAL] if first.base.quant_type else [base]
    plans = {
        choice: plan_merge(weights, bones, pairs, dtype=dtype, dequantized=choice == DEQUANTIZED)
        for choice in dict.fromkeys([base, *choices])
    }
    return Work(adapters, options, how, base, folder, tensors, plans)


def _base_for(base: BasePlan, options: MergeOptions) -> str:
    """Which base is merged into: what was evaluated, unless the user says otherwise."""
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
    from peftkit.model.identity import base_identity, differences

    first = adapters[0]
    one = base_identity(first.source, first.base)
    for other in adapters[1:]:
        two = base_identity(other.source, other.base)
        if other.source != first.source and (
            differences(one, two) or not (one["weights_sha256"] and two["weights_sha256"])
        ):
            got = f"an adapter of {other.base.id}"
            raise UserError(Problem(str(other.folder), got, f"one of {first.base.id}, as the first"))
        if one["quantization"] != two["quantization"]:
            got = f"a base held as {two['quantization'] or 'it is'}"
            raise UserError(Problem(str(other.folder), got, f"{one['quantization'] or 'as it is'}"))


@dataclass(frozen=True)
class _Rows:
    """What is compared on: `texts` for logits, `judged` for losses, with the document of each."""

    texts: tuple[Tokenized, ...]
    judged: tuple[Tokenized, ...]

    @classmethod
    def of(cls, work: Work, path: Path, observer: Observer) -> _Rows:
        """Held-out rows of the run or of --data; short texts where there are none."""
        from peftkit.model.load import load_tokenizer
        from peftkit.ship.verify import prompts

        adapter, data = work.adapters[0], work.options.data
        own = (adapter.folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(
            str(adapter.folder) if own else adapter.source,
            replace(adapter.base, revision=None) if own else adapter.base,
        )
        texts = tuple(prompts(tokenizer, adapter.base.task))
        if adapter.run is None and data is None:
            return cls(texts, ())
        try:
            found = _held_out(adapter, tokenizer, data, path)
        except UserError as error:
            if data is not None:
                raise
            observer({"event": "notice", "text": f"compared on short texts: {error.problems[0].got}"})
            return cls(texts, ())
        return cls(found[:_MOST_ROWS] or texts, found[:_MOST_ROWS])


def _held_out(adapter: Adapter, tokenizer: Any, data: str | None, path: Path) -> tuple[Tokenized, ...]:
    from peftkit.model.load import stops_of
    from peftkit.run.evaluate import examples_for, refuse_other_data, tokenized

    bare = Result(None, tokenizer, adapter.base.task, adapter.plan, adapter.run, 1, True)
    examples, chosen = examples_for(bare, data, path)
    refuse_other_data(bare, examples)
    writes = adapter.base.task in {"causal-lm", "seq2seq"}
    stops = stops_of(adapter.source, tokenizer) if writes else frozenset()
    rows, _ = tokenized(bare, examples, chosen, stops=stops)
    return tuple(rows)


def _published(
    work: Work, path: Path, out: Path, compared: Sequence[str], rows: _Rows, observer: Observer
) -> MergeReport:
    """Write, compare, and publish what holds."""
    with publish_folder(out, sealed=False) as staging:
        begun = time.monotonic()
        write(work, work.base, staging, observer)
        report = replace(_report(work, out), write_seconds=round(time.monotonic() - begun, 2))
        report = _verified(work, report, staging, compared, rows, observer)
        if not report.passed and not work.options.force:
            raise PeftkitError(
                f"the merged model is not what was trained: {report.problem}. Nothing was kept; "
                "--force keeps it all the same"
            )
        write_json(staging / REPORT, report.to_json())
        write_card(staging, path, name=out.name, layout="model", merge_report=report.to_json())
    return report


def write(work: Work, base: str, folder: Path, observer: Observer = lambda event: None) -> None:
    """Weights, configuration and what stands beside them, into a folder that is there and empty."""
    from peftkit.ship.folder import copy_beside
    from peftkit.ship.merge import Sources, write_merged

    first = work.adapters[0]
    observer(
        {"event": "phase", "name": "merge", "detail": f"writing {show_bytes(work.plans[base].num_bytes)}"}
    )
    sources = Sources(first.base, work.tensors, work.combination, requantize=work.options.requantize)

    def progress(done: int, total: int) -> None:
        observer({"event": "progress", "done_bytes": done, "total_bytes": total})

    write_merged(work.plans[base], sources, folder, progress=progress)
    copy_beside(first.folder, work.base_folder, folder, with_code=first.base.trust_remote_code)


def _report(work: Work, out: Path) -> MergeReport:
    """What is known without comparing anything."""
    plan, first = work.plans[work.base], work.adapters[0]
    weights = work.combination.weights
    return MergeReport(
        out=str(out),
        base=work.base if first.base.quant_type else "",
        base_id=shown(first.base.id),
        adapters=tuple((shown(str(a.folder)), w) for a, w in zip(work.adapters, weights, strict=True)),
        how=work.combination.how,
        dtype=", ".join(sorted({str(o.dtype).removeprefix("torch.") for o in plan.outputs})),
        num_tensors=len(plan.outputs),
        num_bytes=plan.num_bytes,
        untied=plan.untied,
        fidelity=None,
        reference="",
        problem="",
        requantized="nf4" if work.options.requantize else "",
    )


def _verified(
    work: Work,
    made: MergeReport,
    staging: Path,
    compared: Sequence[str],
    rows: _Rows,
    observer: Observer,
) -> MergeReport:
    """Compare what is on the disk with base and adapter, and with what the other base would give."""
    from peftkit.ship.verify import compare

    if not work.combination.is_plain:
        return made
    first = work.adapters[0]

    def told(what: str) -> None:
        observer({"event": "phase", "name": "verify", "detail": what})

    told("asking the base with the adapter, as it was trained")
    trained, without = _reference(first, rows)
    told("asking the merged model, read back from the disk")
    got = _asked(staging, first.base, rows)
    fidelity, reference = compare(trained, got, without=without), "what was trained"
    if work.base == ORIGINAL and first.base.quant_type is not None:
        told("asking the original base with the adapter")
        expected, alone = _reference(replace(first, base=replace(first.base, quant_type=None)), rows)
        fidelity = compare(expected, got, without=alone)
        reference = "the original base with the adapter"
    problem = fidelity.problem(_precision(work, first.base))
    made = replace(made, fidelity=fidelity, reference=reference, problem="" if made.requantized else problem)
    if len(compared) < 2:
        return made
    said = {work.base: got}
    for base in compared:
        if base not in said:
            told(f"trying the {base} base as well")
            with _beside(staging) as folder:
                write(work, base, folder, lambda event: None)
                said[base] = _asked(folder, first.base, rows)
    choices = tuple(
        Choice(base, compare(trained, said[base], without=without)) for base in (DEQUANTIZED, ORIGINAL)
    )
    better = _gain(said[DEQUANTIZED], said[ORIGINAL])
    recommended = ORIGINAL if better.low > 0 else DEQUANTIZED
    return replace(made, choices=choices, recommended=recommended, gain=better)


def _precision(work: Work, base: BasePlan) -> str:
    """The narrowest type that numbers of the comparison went through."""
    names = {str(o.dtype).removeprefix("torch.") for o in work.plans[work.base].outputs}
    names |= {base.dtype, base.compute_dtype}
    return next((name for name in ("bfloat16", "float16") if name in names), "float32")


def _reference(adapter: Adapter, rows: _Rows) -> tuple[Any, Any]:
    """(outputs with the adapter, outputs of its base alone)."""
    from peftkit.model.hardware import detect_device
    from peftkit.ship.verify import outputs

    result = load_result(adapter, device=detect_device().kind)
    how = {"pad_id": result.tokenizer.pad_token_id, "task": result.task}
    expected = outputs(result.model, rows.texts, judged=rows.judged, **how)
    with result.model.disable_adapter():
        without = outputs(result.model, rows.texts, **how)
    del result
    gc.collect()
    return expected, without


def _asked(folder: Path, base: BasePlan, rows: _Rows) -> Any:
    """What the model in a folder says, loaded as anybody would."""
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import load_model, load_tokenizer
    from peftkit.ship.verify import outputs

    plain = replace(base, id=str(folder), revision=None, quant_type=None, overrides={}, labels=())
    model = load_model(str(folder), plain, device=detect_device().kind)
    tokenizer = load_tokenizer(str(folder), plain)
    found = outputs(model, rows.texts, pad_id=tokenizer.pad_token_id, task=base.task, judged=rows.judged)
    del model
    gc.collect()
    return found


@contextmanager
def _beside(staging: Path) -> Iterator[Path]:
    """A folder on the same disk, gone at the end."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=staging.name) as folder:
        yield Path(folder)


def _gain(before: Any, after: Any) -> Interval:
    """How much lower the second's loss is, paired by row."""
    documents = tuple(range(len(before.losses.sums)))
    one, two = (Rows(each.losses.sums, each.losses.counts, documents) for each in (before, after))
    return gain(one, two)
