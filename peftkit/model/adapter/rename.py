"""Renaming of an adapter's tensors, into a new folder: `peftkit convert ADAPTER --rename OLD=NEW`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.model.adapter.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from peftkit.model.base.convert import Converted
from peftkit.model.base.file_checks import check_adapter_weights, check_model_folder
from peftkit.rundir import MANIFEST, publish_folder
from peftkit.rundir.disk import resolve_new_folder


def rename_tensors(folder: Path, renames: Sequence[str], *, out: str | Path) -> Converted:
    """Write an adapter with other names of its tensors into a new folder.

    Each of `renames` is OLD=NEW: the first OLD in a name becomes NEW. Raises UserError where one changes nothing,
    or makes two names one.
    """
    from safetensors.torch import load_file, save_file

    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(Problem(str(folder), f"no {ADAPTER_CONFIG}", "an adapter folder"))
    check_model_folder(folder)
    check_adapter_weights(folder)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    names = {name: name for name in tensors}
    for text in renames:
        old, equals, new = text.partition("=")
        changed = {name: current.replace(old, new, 1) for name, current in names.items()} if old else names
        if not equals or changed == names:
            parts = sorted({part for name in tensors for part in name.split(".")})
            fix = did_you_mean(old.strip("."), parts) if equals and old else "OLD= takes OLD out"
            raise UserError(Problem("--rename", text, "OLD=NEW, with OLD in the name of a tensor", fix))
        names = changed
    if len(set(names.values())) < len(names):
        raise UserError(Problem("--rename", " ".join(renames), "names that stay different from each other"))
    target = resolve_new_folder(str(out))
    with publish_folder(target) as staging:
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix in {".json", ".jinja", ".model", ".txt"} and file.name != MANIFEST:
                shutil.copyfile(file, staging / file.name)
        save_file({names[name]: tensor for name, tensor in tensors.items()}, staging / ADAPTER_WEIGHTS)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return Converted(target, (ADAPTER_WEIGHTS,), len(tensors), num_bytes, ())
