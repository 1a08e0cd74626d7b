"""Export target `gguf`, for llama.cpp: the merged model, or the adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.model.base.identity import local_base_folder
from peftkit.model.meta.skeleton import fetch_weights
from peftkit.results.find import find_adapter
from peftkit.rundir import publish_folder, write_json
from peftkit.rundir.disk import resolve_new_folder
from peftkit.rundir.events import Observer, PhaseEvent, ProgressEvent
from peftkit.ship.card.write import write_card
from peftkit.ship.export.base import (
    Exported,
    ExportOptions,
    file_sizes,
    full_model_folder,
    open_full_model,
    require_every_tensor,
)
from peftkit.ship.merge.report import REPORT_FILE

DEFAULT_DTYPE = "f16"
OnWritten = Callable[[Path, Path], None]


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """Write a folder with NAME-TYPE.gguf. Raises UserError, before merging, for what GGUF cannot hold."""
    out = resolve_new_folder(str(options.out))
    with publish_folder(out) as staging:
        report, notes = write_gguf(path, staging, out, options, observer)
        write_card(staging, path, name=out.name, layout="gguf", merge_report=report)
    return Exported(str(out), file_sizes(out), notes, report)


def write_gguf(
    path: Path,
    staging: Path,
    out: Path,
    options: ExportOptions,
    observer: Observer,
    *,
    on_written: OnWritten = lambda gguf, folder: None,
) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Write the GGUF file into `staging`; return (report of a merge on the way, notes).

    `on_written(file, folder)` is called while the folder of the model that the file was made from exists.
    """
    from peftkit.ship.export import gguf

    def progress(done: int, total: int) -> None:
        observer(ProgressEvent(done_bytes=done, total_bytes=total))

    dtype, full_model = options.dtype or DEFAULT_DTYPE, full_model_folder(path, options)
    adapter = find_adapter(path, base=options.base_model) if full_model is None else None
    if adapter is not None and adapter.base.task != "causal-lm":
        got = f"a model for {adapter.base.task}"
        raise UserError(Problem("--to", got, "a causal language model", "export it as safetensors"))
    if adapter is not None and options.lora:
        require_every_tensor(adapter)
        base = fetch_weights(adapter.source, adapter.base)
        gguf_file = gguf.write_adapter(adapter.folder, base, staging / f"{out.name}-lora.gguf", progress=progress)
        return None, gguf_file.notes

    base_folder = None if adapter is None else local_base_folder(adapter.source, adapter.base.revision)
    config_folder = full_model or base_folder  # tells already whether GGUF can hold the model
    if config_folder is not None:
        gguf.check_exportable(config_folder, dtype=dtype, pre=options.pre)
    with open_full_model(path, out, options.merge_options(None), observer) as (folder, report):
        file = staging / f"{out.name}-{dtype}.gguf"
        observer(PhaseEvent(name="gguf", detail=f"writing {file.name}"))
        gguf_file = gguf.write_model(folder, file, dtype=dtype, pre=options.pre, name=out.name, progress=progress)
        on_written(file, folder)
    if report:
        write_json(staging / REPORT_FILE, dict(report))
    return report, gguf_file.notes
