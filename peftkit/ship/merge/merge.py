"""Merge: a folder of dense weights from a base and adapters, published only when it was shown to be right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peftkit import interrupt
from peftkit.errors import PeftkitError
from peftkit.recipe.paths import shown
from peftkit.results.find import Adapter
from peftkit.rundir import is_locked, publish_folder, refuse_without_room, write_json
from peftkit.rundir.disk import new_folder, problems_told
from peftkit.rundir.files import TEMPORARY
from peftkit.ship.card.write import write_card
from peftkit.ship.merge.compare import Compared, verified
from peftkit.ship.merge.decide import MergeOptions, Observer, Work, decided, write
from peftkit.ship.merge.report import REPORT, MergeReport
from peftkit.units import show_bytes

_SPARE_BYTES = 2**26  # tokenizer, configuration, and what a disk keeps for itself


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
    out = new_folder(out)
    _tell_of_left(out, observer)
    with interrupt.listening():
        work = decided(paths, options)
        compared = [work.base]
        rows = Compared.of(work, paths[0], observer)
        both = work.adapters[0].base.quant_type is not None and not options.requantize
        if both and rows.judged and len(work.plans) > 1:
            compared = list(work.plans)
        needed = sum(work.plans[base].num_bytes for base in compared) + _SPARE_BYTES
        refuse_without_room(out, needed, what="the merged model", fix="make room, or choose another --out")
        with problems_told(out, needed):
            return _published(work, paths[0], out, compared, rows, observer)


def _tell_of_left(out: Path, observer: Observer) -> None:
    """What a killed merge left; a folder that a live one writes to is locked."""
    for left in sorted(out.parent.glob(f"{TEMPORARY}{out.name}-*")) if out.parent.is_dir() else ():
        if left.is_dir() and not is_locked(left):
            size = show_bytes(sum(path.stat().st_size for path in left.rglob("*") if path.is_file()))
            text = f"left by a merge that was killed, safe to remove: {left} ({size})"
            observer({"event": "notice", "text": text})


def _published(
    work: Work, path: Path, out: Path, compared: Sequence[str], rows: Compared, observer: Observer
) -> MergeReport:
    """Write, compare, and publish what holds."""
    with publish_folder(out, sealed=False) as staging:
        begun = time.monotonic()
        write(work, work.base, staging, observer)
        report = replace(_report(work, out), write_seconds=round(time.monotonic() - begun, 2))
        report = verified(work, report, staging, compared, rows, observer)
        if not report.passed and not work.options.force:
            raise PeftkitError(
                f"the merged model is not what was trained: {report.problem}. Nothing was kept; "
                "--force keeps it all the same"
            )
        write_json(staging / REPORT, report.to_json())
        write_card(staging, path, name=out.name, layout="model", merge_report=report.to_json())
    return report


def _named(adapters: Sequence[Adapter]) -> list[str]:
    """Names that say which is which and not where: a report travels with the model."""
    return [(a.run.path if a.run is not None else a.folder).resolve().name for a in adapters]


def _report(work: Work, out: Path) -> MergeReport:
    """What is known without comparing anything."""
    plan, first = work.plans[work.base], work.adapters[0]
    weights = work.combination.weights
    return MergeReport(
        out=str(out),
        base=work.base if first.base.quant_type else "",
        base_id=Path(first.base.id).name if Path(first.base.id).exists() else shown(first.base.id),
        adapters=tuple(zip(_named(work.adapters), weights, strict=True)),
        how=work.combination.how,
        dtype=", ".join(sorted({str(o.dtype).removeprefix("torch.") for o in plan.outputs})),
        num_tensors=len(plan.outputs),
        num_bytes=plan.num_bytes,
        untied=plan.untied,
        fidelity=None,
        reference="",
        problem="",
        requantized=str(first.base.quant_type) if work.options.requantize else "",
    )


__all__ = ["MergeOptions", "merge"]
