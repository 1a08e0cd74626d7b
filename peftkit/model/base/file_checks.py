"""Files of a model's folder that may be read: inside it, of a sane size, and named plainly.

A hub cache holds symlinks into the `blobs/` of the same repository: those are inside. Sizes are looked at
before a file is read: a tokenizer of gigabytes fills the memory while it is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.units import show_bytes

_SMALL, _TEXT = 16 * 2**20, 256 * 2**20
MAX_BYTES: Mapping[str, int] = {
    "config.json": _SMALL,
    "generation_config.json": _SMALL,
    "adapter_config.json": _SMALL,
    "tokenizer_config.json": _SMALL,
    "special_tokens_map.json": _SMALL,
    "chat_template.jinja": _SMALL,
    "chat_template.json": _SMALL,
    "added_tokens.json": _SMALL,
    "model.safetensors.index.json": _TEXT,
    "pytorch_model.bin.index.json": _TEXT,
    "tokenizer.json": _TEXT,
    "tokenizer.model": _TEXT,
    "spiece.model": _TEXT,
    "sentencepiece.bpe.model": _TEXT,
    "vocab.json": _TEXT,
    "vocab.txt": _TEXT,
    "merges.txt": _TEXT,
}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_STATE = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler")  # of a Trainer, not weights
_WEIGHTS = (".safetensors", ".gguf")


def _home(folder: Path) -> Path:
    """What a folder's symlinks may lead into: itself, or the repository of a hub cache that it stands in."""
    real = folder.resolve()
    repository = real.parent.parent
    is_snapshot = real.parent.name == "snapshots" and (repository / "blobs").is_dir()
    return repository if is_snapshot else real


def contained_file(folder: Path, name: str) -> Path:
    """A file of a folder. Raises UserError where its name or a symlink leads out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(_home(folder)):
        to = "a symlink" if path.is_symlink() else "a name"
        got = f"{to} that leads out of its folder ({name})"
        raise UserError(Problem(str(folder), got, "files inside the folder", "copy the file into the folder"))
    return path


def check_size(path: Path | None) -> None:
    """Raises UserError for a file that is too large to be what it is named."""
    limit = None if path is None or path.suffix in _WEIGHTS else MAX_BYTES.get(path.name, _TEXT)
    if path is not None and limit is not None and path.is_file() and path.stat().st_size > limit:
        got = f"{path.name} of {show_bytes(path.stat().st_size)}"
        raise UserError(Problem(str(path), got, f"at most {show_bytes(limit)}", "is it what it is named?"))


def check_folder(folder: Path) -> None:
    """Raises UserError, all at once, for files that are too large to be what they are named, or lead out.

    Only what the libraries read is looked at: weights, configuration, tokenizer, template.
    """
    problems: list[Problem] = []
    for path in sorted(folder.iterdir()):
        if path.name not in MAX_BYTES and path.suffix not in {*_WEIGHTS, ".json", ".jinja", ".model"}:
            continue
        try:
            check_size(contained_file(folder, path.name))
        except UserError as error:
            problems.extend(error.problems)
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not problems:
        plain_names(read_json_file(folder, index.name), index, suffixes=(".safetensors",))
    if problems:
        raise UserError(problems)


def read_json_file(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder, no larger than such a file may be. Raises UserError for anything else."""
    path = contained_file(folder, name)
    check_size(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(str(path), f"text that is not JSON ({error})", "a JSON object")) from None
    if not isinstance(found, dict):
        raise UserError(Problem(str(path), type(found).__name__, "a JSON object"))
    return found


def plain_names(index: Mapping[str, Any], path: Path, *, suffixes: Iterable[str]) -> list[str]:
    """The files of a sharded index, in order. Raises UserError where one is no plain name of a file there."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise UserError(Problem(str(path), "no weight_map", "the files that hold the weights"))
    names = list(dict.fromkeys(str(name) for name in weight_map.values()))
    for name in names:
        plain = "\0" not in name and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(tuple(suffixes)):
            got = f"a weight_map that names {name[:80]!r}"
            raise UserError(Problem(str(path), got, "names of weight files in the same folder"))
        if not contained_file(path.parent, name).is_file():
            raise UserError(Problem(str(path), f"{name}, which is not there", "every file that it names"))
    return sorted(names)


def pickled_weights(folder: Path) -> list[str]:
    """Names of pickled weights in a folder, those of a Trainer's state left out."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    return [name for name in names if not _STATE.match(name)]


def how_to_convert(path: Path | str) -> str:
    """What to do about pickled weights, as a fix."""
    return f"pickled weights can run code: peftkit convert {path} --out NEW writes them as safetensors"


def check_adapter_weights(folder: Path) -> None:
    """Raises UserError where an adapter has no weights as safetensors: PEFT would unpickle others."""
    if not (folder / "adapter_model.safetensors").is_file():
        found = pickled_weights(folder)
        got = f"{found[0]} only" if found else "no adapter_model.safetensors"
        fix = how_to_convert(folder) if found else ""
        raise UserError(Problem(str(folder), got, "the adapter's weights as adapter_model.safetensors", fix))
