"""Export target `safetensors`: the merged model in transformers' layout, sharded as its base."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.rundir import MANIFEST, publish_folder, require_free_space
from peftkit.rundir.disk import resolve_new_folder
from peftkit.rundir.events import Observer
from peftkit.ship.export.base import Exported, ExportOptions, file_sizes, full_model_folder
from peftkit.ship.merge.merge import merge
from peftkit.ship.merge.report import read_merge_report


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """Merge an adapter, or copy a full model."""
    out, folder = resolve_new_folder(str(options.out)), full_model_folder(path, options)
    if folder is None:
        merge([path], out, options.merge_options(options.dtype), observer=observer)
        return Exported(str(out), file_sizes(out), merge=read_merge_report(out))
    if options.dtype:
        got = f"{options.dtype} of a full model"
        raise UserError(Problem("--dtype", got, "a run or an adapter", "leave it out"))
    size = sum(num_bytes for _, num_bytes in file_sizes(folder))
    require_free_space(out, size, what="the model", fix="make room, or choose another --out")
    with publish_folder(out) as staging:
        for name, _ in file_sizes(folder):
            if name != MANIFEST:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, staging / name)
    return Exported(str(out), file_sizes(out), merge=read_merge_report(out))
