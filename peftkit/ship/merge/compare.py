"""Comparison of a merged model with the trained one: logits, and losses where there are held-out rows."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.data.tokens.mask import Tokenized
from peftkit.diagnose.statistics import HeldOutLosses, paired_gain
from peftkit.errors import UserError
from peftkit.model.adapter.load import load_weighted_adapters
from peftkit.model.hardware import detect_device
from peftkit.model.load import load_model, load_tokenizer, read_stop_ids
from peftkit.objectives import OBJECTIVES
from peftkit.plan.plan import BasePlan
from peftkit.results.evaluate import load_examples, refuse_mismatched_data, tokenize_for_result
from peftkit.results.find import Adapter
from peftkit.results.load import Result, load_adapter_result
from peftkit.rundir import read_json
from peftkit.rundir.events import NoticeEvent, Observer, PhaseEvent
from peftkit.ship.merge.decide import DEQUANTIZED, ORIGINAL, MergeJob, write_merge
from peftkit.ship.merge.fidelity import Fidelity, compute_outputs, measure_fidelity, prompt_rows
from peftkit.ship.merge.report import BaseComparison, MergeReport

_MAX_LOST_SHARE = 0.5  # of what the adapter changes
_MAX_LOSS_ROWS = 200  # of held-out rows that a loss is measured on


@dataclass(frozen=True)
class ComparisonRows:
    """Rows of a comparison: `texts` for logits, `loss_rows` for losses."""

    texts: tuple[Tokenized, ...]
    loss_rows: tuple[Tokenized, ...]

    @classmethod
    def of(cls, job: MergeJob, path: Path, observer: Observer) -> ComparisonRows:
        """Select held-out rows of the run or of `--data`; short texts where there are none."""
        adapter, data = job.adapters[0], job.options.data
        has_tokenizer = (adapter.folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(
            str(adapter.folder) if has_tokenizer else adapter.source,
            replace(adapter.base, revision=None) if has_tokenizer else adapter.base,
        )
        texts = tuple(prompt_rows(tokenizer, adapter.base.task))
        if adapter.run is None and data is None:
            return cls(texts, ())
        try:
            result = Result(None, tokenizer, adapter.base.task, adapter.plan, adapter.run, 1, True)
            examples, held_out_examples = load_examples(result, data, path)
            refuse_mismatched_data(result, examples)
            is_generative = OBJECTIVES[adapter.base.task].generates_answers
            stops = read_stop_ids(adapter.source, tokenizer) if is_generative else frozenset()
            rows, _ = tokenize_for_result(result, examples, held_out_examples, stops=stops)
            held_out_rows = tuple(rows)
        except UserError as error:
            if data is not None:
                raise
            observer(NoticeEvent(text=f"compared on short texts, without a loss: {error.problems[0].got}"))
            return cls(texts, ())
        return cls(held_out_rows[:_MAX_LOSS_ROWS] or texts, held_out_rows[:_MAX_LOSS_ROWS])


def verify_merge(
    job: MergeJob,
    report: MergeReport,
    staging: Path,
    base_choices: Sequence[str],
    rows: ComparisonRows,
    observer: Observer,
) -> MergeReport:
    """Compare the written model with base and adapter, and with a merge into the other base.

    Returns the report with fidelity, reference and problem; with two bases also both comparisons, the
    recommended one, and the gain in loss of the original base in nats per loss token.
    """
    if not job.combination.is_plain:
        return _verify_sum(job, report, staging, rows, observer)
    first = job.adapters[0]

    def announce(detail: str) -> None:
        observer(PhaseEvent(name="verify", detail=detail))

    announce("running the base with the adapter, as trained")
    trained_outputs, base_outputs = _reference_outputs(first, rows)
    announce("running the merged model, read back from the disk")
    merged_outputs = _merged_outputs(staging, first.base, rows)
    fidelity, reference = (
        measure_fidelity(trained_outputs, merged_outputs, base_outputs=base_outputs),
        "the trained model",
    )
    if job.base == ORIGINAL and first.base.quant_type is not None:
        announce("running the original base with the adapter")
        expected, original_outputs = _reference_outputs(replace(first, base=replace(first.base, quant_type=None)), rows)
        fidelity = measure_fidelity(expected, merged_outputs, base_outputs=original_outputs)
        reference = "the original base with the adapter"
    problem = fidelity.problem(_narrowest_dtype(job, first.base))
    report = replace(
        report, fidelity=fidelity, reference=reference, problem=_requantization_problem(report, fidelity, problem)
    )
    if len(base_choices) < 2:
        return report
    outputs_by_base = {job.base: merged_outputs}
    for base in base_choices:
        if base not in outputs_by_base:
            announce(f"merging into the {base} base to compare")
            with tempfile.TemporaryDirectory(dir=staging.parent, prefix=staging.name) as name:
                folder = Path(name)
                write_merge(job, base, folder)
                outputs_by_base[base] = _merged_outputs(folder, first.base, rows)
    choices = tuple(
        BaseComparison(base, measure_fidelity(trained_outputs, outputs_by_base[base], base_outputs=base_outputs))
        for base in (DEQUANTIZED, ORIGINAL)
    )
    # how much lower the loss on the original base is, paired by row
    before = outputs_by_base[DEQUANTIZED]
    after = outputs_by_base[ORIGINAL]
    documents = tuple(range(len(before.losses.sums)))
    rows_before, rows_after = (
        HeldOutLosses(model_outputs.losses.sums, model_outputs.losses.counts, documents)
        for model_outputs in (before, after)
    )
    loss_gain = paired_gain(rows_before, rows_after)
    recommended = ORIGINAL if loss_gain.low > 0 else DEQUANTIZED
    return replace(report, choices=choices, recommended=recommended, gain=loss_gain)


def _requantization_problem(report: MergeReport, fidelity: Fidelity, problem: str) -> str:
    """Return the problem; for a requantized model only where over half of the adapter's effect is lost.

    What 4 bits cost below that is the user's choice.
    """
    if not report.requantized:
        return problem
    if fidelity.effect is not None and not fidelity.kl <= _MAX_LOST_SHARE * fidelity.effect:
        share = fidelity.kl / max(fidelity.effect, 1e-12)
        return f"in {report.requantized} again, {share:.0%} of what the adapter changes is lost"
    return ""


def _verify_sum(
    job: MergeJob, report: MergeReport, staging: Path, rows: ComparisonRows, observer: Observer
) -> MergeReport:
    """Compare a sum of LoRA adapters with PEFT's model with all adapters active.

    Other combinations have no reference: their report is returned as it is.
    """
    first = job.adapters[0]
    if not job.is_sum_of_lora:
        return report
    observer(PhaseEvent(name="verify", detail="running the base with all adapters active"))
    base_plan = replace(first.base, quant_type=None) if job.base == ORIGINAL else first.base
    model = load_model(first.source, base_plan, device=detect_device().kind)
    model = load_weighted_adapters(model, [adapter.folder for adapter in job.adapters], job.combination.weights)
    pad_id = load_tokenizer(str(staging), replace(first.base, revision=None)).pad_token_id
    output_options = {"pad_id": pad_id, "task": first.base.task}
    expected = compute_outputs(model, rows.texts, loss_rows=rows.loss_rows, **output_options)
    with model.disable_adapter():
        base_outputs = compute_outputs(model, rows.texts, **output_options)
    del model
    gc.collect()
    observer(PhaseEvent(name="verify", detail="running the merged model, read back from the disk"))
    fidelity = measure_fidelity(expected, _merged_outputs(staging, first.base, rows), base_outputs=base_outputs)
    problem = fidelity.problem(_narrowest_dtype(job, first.base))
    reference = "the base with all adapters active"
    return replace(
        report, fidelity=fidelity, reference=reference, problem=_requantization_problem(report, fidelity, problem)
    )


def _narrowest_dtype(job: MergeJob, base: BasePlan) -> str:
    """Return the narrowest dtype that the compared numbers went through."""
    names = {str(output.dtype).removeprefix("torch.") for output in job.plans[job.base].outputs}
    names |= {base.dtype, base.compute_dtype}
    return next((name for name in ("bfloat16", "float16") if name in names), "float32")


def _reference_outputs(adapter: Adapter, rows: ComparisonRows) -> tuple[Any, Any]:
    """Return (outputs with the adapter, outputs of its base alone)."""
    result = load_adapter_result(adapter, device=detect_device().kind)
    output_options = {"pad_id": result.tokenizer.pad_token_id, "task": result.task}
    expected = compute_outputs(result.model, rows.texts, loss_rows=rows.loss_rows, **output_options)
    with result.model.disable_adapter():
        base_outputs = compute_outputs(result.model, rows.texts, **output_options)
    del result
    gc.collect()
    return expected, base_outputs


def _merged_outputs(folder: Path, base: BasePlan, rows: ComparisonRows) -> Any:
    """Return the outputs of the model in a folder, loaded from disk as any reader would."""
    merged_plan = replace(base, id=str(folder), revision=None, quant_type=None, overrides={}, labels=())
    config = read_json(folder / "config.json")
    if "quantization_config" in config:  # its other weights stay in the type that they are in
        merged_plan = replace(merged_plan, dtype=str(config.get("dtype") or config.get("torch_dtype") or base.dtype))
    model = load_model(str(folder), merged_plan, device=detect_device().kind)
    tokenizer = load_tokenizer(str(folder), merged_plan)
    merged_outputs = compute_outputs(
        model, rows.texts, pad_id=tokenizer.pad_token_id, task=base.task, loss_rows=rows.loss_rows
    )
    del model
    gc.collect()
    return merged_outputs
