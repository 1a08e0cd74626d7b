"""The merged model in transformers' layout, sharded as its base."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.rundir import MANIFEST, publish_folder, refuse_without_room
from peftkit.rundir.disk import new_folder
from peftkit.ship.export.base import Exported, ExportOptions, Observer, files_in, whole_model
from peftkit.ship.merge.merge import merge
from peftkit.ship.merge.report import read_report


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """Merge, or copy a model that is whole already."""
    out, folder = new_folder(str(options.out)), whole_model(path, options)
    if folder is None:
        merge([path], out, options.merging(options.dtype), observer=observer)
        return Exported(str(out), files_in(out), merge=read_report(out))
    if options.dtype:
        got = f"{options.dtype} of a model that is whole"
        raise UserError(Problem("--dtype", got, "a run or an adapter", "leave it out"))
    size = sum(num_bytes for _, num_bytes in files_in(folder))
    refuse_without_room(out, size, what="the model", fix="make room, or choose another --out")
    with publish_folder(out) as staging:
        for name, _ in files_in(folder):
            if name != MANIFEST:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, staging / name)
    return Exported(str(out), files_in(out), merge=read_report(out))
