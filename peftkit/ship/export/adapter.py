"""The adapter in PEFT's layout with its card; with --for vllm as vLLM serves it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.results.find import Adapter, adapter_folder, find_adapter
from peftkit.rundir import MANIFEST, publish_folder
from peftkit.rundir.disk import new_folder
from peftkit.ship.card.write import write_card
from peftkit.ship.export.base import Exported, ExportOptions, Observer, files_in

ENGINES = ("vllm",)
_KEPT = ("adapter_config.json", "adapter_model.safetensors", "peftkit.json")
_CLOSE, _CLOSE_IN_16_BITS = 1e-5, 5e-3  # of a change's length: what one rounding of B can do


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """Copy an adapter, or rewrite it. Raises UserError where there is none, or vLLM rejects it."""
    if options.engine not in {None, *ENGINES}:
        raise UserError(Problem("--for", str(options.engine), ", ".join(ENGINES)))
    out = new_folder(str(options.out))
    if options.base_model and not options.engine:
        got = f"{options.base_model} with a plain copy"
        raise UserError(Problem("--base-model", got, "--for vllm", "leave it out"))
    adapter = find_adapter(path, base=options.base_model) if options.engine else None
    folder = adapter.folder if adapter is not None else adapter_folder(path)
    with publish_folder(out) as staging:
        said = _rewritten(adapter, staging) if adapter is not None else _copied(folder, staging)
        for file in _tokenizer(folder):
            shutil.copyfile(file, staging / file.name)
        write_card(staging, path, name=options.repo or out.name, layout="adapter")
    return Exported(str(out), files_in(out), said)


def _copied(folder: Path, staging: Path) -> tuple[str, ...]:
    from peftkit.model.adapter.load import WEIGHTS
    from peftkit.ship.files.tensors import read_all, refuse_non_finite

    refuse_non_finite(read_all([folder / WEIGHTS]))
    for name in _KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    return ()


def _tokenizer(folder: Path) -> Iterator[Path]:
    from peftkit.ship.files.folder import TOKENIZER

    for path in sorted({path for pattern in TOKENIZER for path in folder.glob(pattern)}):
        if path.is_file() and path.name != MANIFEST:
            yield path


def _rewritten(adapter: Adapter, staging: Path) -> tuple[str, ...]:
    from peftkit.model.adapter.edits import edits_of, refuse_unmergeable
    from peftkit.model.adapter.load import WEIGHTS
    from peftkit.model.meta.skeleton import blank
    from peftkit.ship.export.vllm import write_for_vllm
    from peftkit.ship.files.tensors import read_all, refuse_non_finite

    refuse_unmergeable(adapter.folder, adapter.config)
    tensors = read_all([adapter.folder / WEIGHTS])
    refuse_non_finite(tensors)
    shapes = {name: entry.shape for name, entry in tensors.items()}
    model = blank(adapter.source, adapter.base)
    parameters = set(model.state_dict())
    edits = edits_of(model, adapter.folder, shapes)
    made = write_for_vllm(adapter.folder, adapter.config, edits, tensors, staging, parameters=parameters)
    _refuse_unlike(adapter, staging)
    return (*made.changes, made.said)


def _refuse_unlike(adapter: Adapter, staging: Path) -> None:
    """Raises PeftkitError unless what was written changes every weight as the adapter does."""
    from peftkit.model.adapter.edits import edits_of
    from peftkit.model.adapter.load import WEIGHTS
    from peftkit.model.meta.skeleton import blank
    from peftkit.ship.files.tensors import read_all
    from peftkit.ship.merge.deltas import low_rank

    found = []
    for folder in (adapter.folder, staging):
        tensors = read_all([folder / WEIGHTS])
        shapes = {name: entry.shape for name, entry in tensors.items()}
        found.append((tensors, edits_of(blank(adapter.source, adapter.base), folder, shapes)))
    (old, before), (new, after) = found
    before = {name: own for name, own in before.items() if not all(edit.copied for edit in own)}
    if before.keys() != after.keys():
        raise PeftkitError("what was written for vLLM adapts other modules than the adapter does")
    for name, edits in before.items():
        edit = next(edit for edit in edits if not edit.copied)
        one = low_rank(edit, lambda key: old[key].read())
        two = low_rank(after[name][0], lambda key: new[key].read())
        rounding = _CLOSE if old[edit.tensors["B"]].dtype.itemsize >= 4 else _CLOSE_IN_16_BITS
        if float((one - two).norm()) > rounding * float(one.norm()):
            raise PeftkitError(f"what was written for vLLM changes {name} otherwise than the adapter does")
