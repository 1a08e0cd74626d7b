"""Merge of adapters into their base: dense weights, published only if they match the trained model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peftkit import interrupt
from peftkit.errors import PeftkitError
from peftkit.model.adapter.load import ignored_keys
from peftkit.model.adapter.rename import expert_order_doubt
from peftkit.recipe.paths import redact_url
from peftkit.rundir import is_being_written, publish_folder, require_free_space, write_json
from peftkit.rundir.disk import explain_disk_errors, resolve_new_folder
from peftkit.rundir.events import NoticeEvent, Observer, ignore_event
from peftkit.rundir.files import TEMPORARY_PREFIX
from peftkit.ship.card.write import write_card
from peftkit.ship.merge.compare import ComparisonRows, verify_merge
from peftkit.ship.merge.decide import MergeOptions, plan_merge_inputs, write_merge
from peftkit.ship.merge.report import REPORT_FILE, MergeReport
from peftkit.units import show_bytes

_SPARE_BYTES = 2**26  # tokenizer, configuration, and what a disk keeps for itself


def merge(paths: Sequence[Path], out: Path, options: MergeOptions, *, observer: Observer = ignore_event) -> MergeReport:
    """Write the dense model of a base and its adapters into `out` and report its fidelity.

    Raises UserError for problems that the user can fix, before anything is written where it can be known, and
    PeftkitError where the written model differs from the trained one, unless `force` is set. Then, and after
    an interruption, nothing is left in `out`.
    """
    out = resolve_new_folder(out)
    for leftover in sorted(out.parent.glob(f"{TEMPORARY_PREFIX}{out.name}-*")) if out.parent.is_dir() else ():
        if leftover.is_dir() and not is_being_written(leftover):
            size = show_bytes(sum(path.stat().st_size for path in leftover.rglob("*") if path.is_file()))
            text = f"left by a merge that was killed, safe to remove: {leftover} ({size})"
            observer(NoticeEvent(text=text))
    with interrupt.catch_signals():
        job = plan_merge_inputs(paths, options)
        base_choices = [job.base]
        rows = ComparisonRows.of(job, paths[0], observer)
        compare_both = job.adapters[0].base.quant_type is not None and not options.requantize
        if compare_both and rows.loss_rows and len(job.plans) > 1:
            base_choices = list(job.plans)
        num_bytes = sum(job.plans[base].num_bytes for base in base_choices) + _SPARE_BYTES
        require_free_space(out, num_bytes, what="the merged model", fix="make room, or choose another --out")
        with explain_disk_errors(out, num_bytes):
            # write, compare, and publish what holds
            with publish_folder(out, sealed=False) as staging:
                start_time = time.monotonic()
                write_merge(job, job.base, staging, observer)
                # names only, no folders: the report travels with the model
                plan, first = job.plans[job.base], job.adapters[0]
                weights = job.combination.weights
                unverified_report = MergeReport(
                    out=str(out),
                    base=job.base if first.base.quant_type else "",
                    base_id=Path(first.base.id).name if Path(first.base.id).exists() else redact_url(first.base.id),
                    adapters=tuple(
                        zip(
                            [
                                (adapter.run.path if adapter.run is not None else adapter.folder).resolve().name
                                for adapter in job.adapters
                            ],
                            weights,
                            strict=True,
                        )
                    ),
                    how=job.combination.how,
                    dtype=", ".join(sorted({str(output.dtype).removeprefix("torch.") for output in plan.outputs})),
                    num_tensors=len(plan.outputs),
                    num_bytes=plan.num_bytes,
                    untied=plan.untied,
                    ignored=tuple(key for adapter in job.adapters for key in ignored_keys(adapter.config)),
                    doubts=tuple(
                        filter(None, (expert_order_doubt(adapter.folder, adapter.config) for adapter in job.adapters))
                    ),
                    fidelity=None,
                    reference="",
                    problem="",
                    requantized=str(first.base.quant_type) if job.options.requantize else "",
                )
                report = replace(unverified_report, write_seconds=round(time.monotonic() - start_time, 2))
                report = verify_merge(job, report, staging, base_choices, rows, observer)
                if not report.passed and not job.options.force:
                    raise PeftkitError(
                        f"the merged model differs from the trained one: {report.problem}. Nothing was written; "
                        "--force writes it all the same"
                    )
                write_json(staging / REPORT_FILE, report.to_json())
                write_card(staging, paths[0], name=out.name, layout="model", merge_report=report.to_json())
            return report


__all__ = ["MergeOptions", "merge"]
