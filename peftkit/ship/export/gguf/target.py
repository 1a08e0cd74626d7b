"""GGUF for llama.cpp: the merged model, or the adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.results.find import Adapter, find_adapter
from peftkit.rundir import publish_folder, write_json
from peftkit.rundir.disk import new_folder
from peftkit.ship.card.write import write_card
from peftkit.ship.export.base import Exported, ExportOptions, Observer, dense, files_in, whole_model
from peftkit.ship.merge.report import REPORT

DTYPE = "f16"
Beside = Callable[[Path, Path], None]


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """A folder with NAME-TYPE.gguf. Raises UserError, before it merges, for what GGUF cannot hold."""
    out = new_folder(str(options.out))
    with publish_folder(out) as staging:
        report, notes = write_gguf(path, staging, out, options, observer)
        write_card(staging, path, name=out.name, layout="gguf", merge_report=report)
    return Exported(str(out), files_in(out), notes, report)


def write_gguf(
    path: Path,
    staging: Path,
    out: Path,
    options: ExportOptions,
    observer: Observer,
    *,
    beside: Beside = lambda gguf, folder: None,
) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Write the GGUF file into `staging`: (the report of a merge on the way, what to know of the file).

    `beside` is called with the file and the folder of the model that it was made from, while that is there.
    """
    from peftkit.model.meta.skeleton import weights_folder
    from peftkit.ship.export import gguf

    def progress(done: int, total: int) -> None:
        observer({"event": "progress", "done_bytes": done, "total_bytes": total})

    dtype, whole = options.dtype or DTYPE, whole_model(path, options)
    adapter = find_adapter(path, base=options.base_model) if whole is None else None
    if adapter is not None and adapter.base.task != "causal-lm":
        got = f"a model for {adapter.base.task}"
        raise UserError(Problem("--to", got, "one that writes text", "export it as safetensors"))
    if adapter is not None and options.lora:
        base = weights_folder(adapter.source, adapter.base)
        made = gguf.write_adapter(adapter.folder, base, staging / f"{out.name}-lora.gguf", progress=progress)
        return None, made.notes
    known = whole or _told_by(adapter)
    if known is not None:
        gguf.check_exportable(known, dtype=dtype, pre=options.pre)
    with dense(path, out, options.merging(None), observer) as (folder, report):
        file = staging / f"{out.name}-{dtype}.gguf"
        observer({"event": "phase", "name": "gguf", "detail": f"writing {file.name}"})
        made = gguf.write_model(folder, file, dtype=dtype, pre=options.pre, name=out.name, progress=progress)
        beside(file, folder)
    if report:
        write_json(staging / REPORT, dict(report))
    return report, made.notes


def _told_by(adapter: Adapter | None) -> Path | None:
    """The base's folder, whose configuration and tokenizer tell already whether GGUF can hold the model."""
    from peftkit.model.base.identity import folder_of

    return None if adapter is None else folder_of(adapter.source, adapter.base.revision)
