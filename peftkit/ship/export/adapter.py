"""Export target `adapter`: PEFT's files with a model card; rewritten for vLLM with `--for vllm`."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.model.adapter.edits import read_edits, refuse_unmergeable
from peftkit.model.adapter.load import ADAPTER_WEIGHTS, ignored_keys, read_adapter_config
from peftkit.model.adapter.rename import expert_order_doubt
from peftkit.model.base.locate import BaseNotFoundError
from peftkit.model.meta.skeleton import meta_model
from peftkit.results.find import Adapter, find_adapter, find_adapter_folder
from peftkit.rundir import MANIFEST, publish_folder
from peftkit.rundir.disk import resolve_new_folder
from peftkit.rundir.events import Observer
from peftkit.ship.card.write import write_card
from peftkit.ship.export.base import Exported, ExportOptions, file_sizes, refuse_foreign_names, require_every_tensor
from peftkit.ship.files.folder import TOKENIZER_FILES
from peftkit.ship.files.tensors import read_all_entries, refuse_non_finite
from peftkit.ship.merge.deltas import low_rank_delta

ENGINES = ("vllm",)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "peftkit.json")
_FP32_TOLERANCE, _HALF_TOLERANCE = 1e-5, 5e-3  # of a change's length: what one rounding of B can do


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """Copy an adapter, or rewrite it for vLLM. Raises UserError where there is none, or vLLM rejects it."""
    if options.engine not in {None, *ENGINES}:
        raise UserError(Problem("--for", str(options.engine), ", ".join(ENGINES)))
    out = resolve_new_folder(str(options.out))
    adapter = find_adapter(path, base=options.base_model, need_weights=False) if options.engine else None
    folder = adapter.folder if adapter is not None else find_adapter_folder(path)
    notes: tuple[str, ...] = ()
    if adapter is None:
        refuse_foreign_names(folder)
        try:
            whole = find_adapter(path, base=options.base_model, need_weights=False)
        except BaseNotFoundError as error:
            if options.base_model:
                raise
            reason = error.problems[0].got
            notes = (f"its base is not at hand ({reason}): the tensors were not compared with the base's layers",)
        else:
            require_every_tensor(whole)
    if ignored := ignored_keys(read_adapter_config(folder)):
        notes = (*notes, f"this PEFT does not know, and ignores, {', '.join(ignored)}")
    if doubt := expert_order_doubt(folder, read_adapter_config(folder)):
        notes = (*notes, doubt)
    with publish_folder(out) as staging:
        if adapter is not None:
            notes += _rewrite_for_vllm(adapter, staging)
        else:
            refuse_non_finite(read_all_entries([folder / ADAPTER_WEIGHTS]))
            for name in _ADAPTER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, staging / name)
        for file in sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}):
            if file.is_file() and file.name != MANIFEST:
                shutil.copyfile(file, staging / file.name)
        write_card(staging, path, name=options.repo or out.name, layout="adapter")
    return Exported(str(out), file_sizes(out), notes)


def _rewrite_for_vllm(adapter: Adapter, staging: Path) -> tuple[str, ...]:
    from peftkit.ship.export.vllm import write_for_vllm

    refuse_unmergeable(adapter.folder, adapter.config)
    tensors = read_all_entries([adapter.folder / ADAPTER_WEIGHTS])
    refuse_non_finite(tensors)
    shapes = {name: entry.shape for name, entry in tensors.items()}
    model = meta_model(adapter.source, adapter.base)
    parameters = set(model.state_dict())
    edits = read_edits(model, adapter.folder, shapes)
    rewrite = write_for_vllm(adapter.folder, adapter.config, edits, tensors, staging, parameters=parameters)
    _check_same_deltas(adapter, staging)
    return (*rewrite.changes, rewrite.said)


def _check_same_deltas(adapter: Adapter, staging: Path) -> None:
    """Raise PeftkitError unless the written adapter changes every weight as the original does.

    ||D' - D|| <= tolerance * ||D|| for each delta D, where the tolerance is what one rounding of B can cause.
    """
    sides = []
    for folder in (adapter.folder, staging):
        tensors = read_all_entries([folder / ADAPTER_WEIGHTS])
        shapes = {name: entry.shape for name, entry in tensors.items()}
        sides.append((tensors, read_edits(meta_model(adapter.source, adapter.base), folder, shapes)))
    (old_tensors, old_edits), (new_tensors, new_edits) = sides
    old_edits = {
        name: weight_edits
        for name, weight_edits in old_edits.items()
        if not all(edit.is_table_copy for edit in weight_edits)
    }
    if old_edits.keys() != new_edits.keys():
        raise PeftkitError("the adapter written for vLLM adapts other modules than the original")
    for name, edits in old_edits.items():
        edit = next(edit for edit in edits if not edit.is_table_copy)
        delta = low_rank_delta(edit, lambda key: old_tensors[key].read())
        written_delta = low_rank_delta(new_edits[name][0], lambda key: new_tensors[key].read())
        rounding = _FP32_TOLERANCE if old_tensors[edit.tensors["B"]].dtype.itemsize >= 4 else _HALF_TOLERANCE
        if float((delta - written_delta).norm()) > rounding * float(delta.norm()):
            raise PeftkitError(f"the adapter written for vLLM changes {name} differently from the original")
