"""Path and size checks of a model folder's files, made before any library reads them.

Symlinks of a hub cache into `blobs/` of the same repository count as inside the folder. Sizes are checked
first because parsing a tokenizer of gigabytes fills the memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.units import show_bytes

_MAX_CONFIG_BYTES, _MAX_TOKENIZER_BYTES = 16 * 2**20, 256 * 2**20
MAX_BYTES: Mapping[str, int] = {
    "config.json": _MAX_CONFIG_BYTES,
    "generation_config.json": _MAX_CONFIG_BYTES,
    "adapter_config.json": _MAX_CONFIG_BYTES,
    "tokenizer_config.json": _MAX_CONFIG_BYTES,
    "special_tokens_map.json": _MAX_CONFIG_BYTES,
    "chat_template.jinja": _MAX_CONFIG_BYTES,
    "chat_template.json": _MAX_CONFIG_BYTES,
    "added_tokens.json": _MAX_CONFIG_BYTES,
    "model.safetensors.index.json": _MAX_TOKENIZER_BYTES,
    "pytorch_model.bin.index.json": _MAX_TOKENIZER_BYTES,
    "tokenizer.json": _MAX_TOKENIZER_BYTES,
    "tokenizer.model": _MAX_TOKENIZER_BYTES,
    "spiece.model": _MAX_TOKENIZER_BYTES,
    "sentencepiece.bpe.model": _MAX_TOKENIZER_BYTES,
    "vocab.json": _MAX_TOKENIZER_BYTES,
    "vocab.txt": _MAX_TOKENIZER_BYTES,
    "merges.txt": _MAX_TOKENIZER_BYTES,
}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TRAINER_STATE = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler")  # of a Trainer, not weights
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")


def contained_file(folder: Path, name: str) -> Path:
    """Return the path of a folder's file.

    Raises UserError where the name or a symlink leads out of the folder.
    """
    path = folder / name
    # symlinks may lead into the folder, or into its repository of a hub cache
    resolved = folder.resolve()
    repository = resolved.parent.parent
    is_snapshot = resolved.parent.name == "snapshots" and (repository / "blobs").is_dir()
    containing_folder = repository if is_snapshot else resolved
    if not path.resolve().is_relative_to(containing_folder):
        kind = "a symlink" if path.is_symlink() else "a name"
        got = f"{kind} that leads out of its folder ({name})"
        raise UserError(Problem(str(folder), got, "files inside the folder", "copy the file into the folder"))
    return path


def check_file_size(path: Path | None) -> None:
    """Raise UserError for a file too large for its name.

    The limits are 16 MiB for configuration and 256 MiB for other files; weights have none.
    """
    limit = None if path is None or path.suffix in _WEIGHT_SUFFIXES else MAX_BYTES.get(path.name, _MAX_TOKENIZER_BYTES)
    if path is not None and limit is not None and path.is_file() and path.stat().st_size > limit:
        got = f"{path.name} of {show_bytes(path.stat().st_size)}"
        raise UserError(
            Problem(str(path), got, f"at most {show_bytes(limit)}", "check that the file is what its name says")
        )


def check_model_folder(folder: Path) -> None:
    """Raise UserError, with all problems at once, for files that are too large for their names or lead out.

    Only files that the libraries read are checked: weights, configuration, tokenizer, template.
    """
    problems: list[Problem] = []
    for path in sorted(folder.iterdir()):
        if path.name not in MAX_BYTES and path.suffix not in {*_WEIGHT_SUFFIXES, ".json", ".jinja", ".model"}:
            continue
        try:
            check_file_size(contained_file(folder, path.name))
        except UserError as error:
            problems.extend(error.problems)
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not problems:
        shard_names(read_json_file(folder, index.name), index, suffixes=(".safetensors",))
    if problems:
        raise UserError(problems)


def read_json_file(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a model folder, with its path and size checked.

    Raises UserError for anything else.
    """
    path = contained_file(folder, name)
    check_file_size(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(str(path), f"text that is not JSON ({error})", "a JSON object")) from None
    if not isinstance(content, dict):
        raise UserError(Problem(str(path), type(content).__name__, "a JSON object"))
    return content


def shard_names(index: Mapping[str, object], path: Path, *, suffixes: Iterable[str]) -> list[str]:
    """Return the weight files of a sharded index, sorted.

    Raises UserError where an entry is not the plain name of an existing file with one of the `suffixes`.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise UserError(Problem(str(path), "no weight_map", "the files that hold the weights"))
    names = list(dict.fromkeys(str(name) for name in weight_map.values()))
    for name in names:
        is_plain = "\0" not in name and Path(name).name == name and "\\" not in name
        if not is_plain or not name.endswith(tuple(suffixes)):
            got = f"a weight_map that names {name[:80]!r}"
            raise UserError(Problem(str(path), got, "names of weight files in the same folder"))
        if not contained_file(path.parent, name).is_file():
            raise UserError(Problem(str(path), f"{name}, which does not exist", "every file named in the index"))
    return sorted(names)


def pickled_weights(folder: Path) -> list[str]:
    """Return the names of pickled weight files in a folder, without a Trainer's state."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    return [name for name in names if not _TRAINER_STATE.match(name)]


def conversion_fix(path: Path | str) -> str:
    """Return the fix for pickled weights: the `peftkit convert` command."""
    return f"pickled weights can run code: peftkit convert {path} --out NEW writes them as safetensors"


def check_adapter_weights(folder: Path) -> None:
    """Raise UserError where an adapter has no safetensors weights: PEFT would unpickle others."""
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = pickled_weights(folder)
        got = f"{pickled[0]} only" if pickled else "no adapter_model.safetensors"
        fix = conversion_fix(folder) if pickled else ""
        raise UserError(Problem(str(folder), got, "the adapter's weights as adapter_model.safetensors", fix))
