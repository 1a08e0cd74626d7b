"""The data files of a path, a folder or a glob. No file is skipped silently."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePath

from peftkit.data.read.rows import MAX_PROBLEMS, Fault, File, Row
from peftkit.data.read.streams import MAX_LINE_BYTES, split_suffixes, translate_read_errors
from peftkit.data.read.tables import read_arrow, read_parquet
from peftkit.data.read.texts import read_csv, read_json_array, read_json_lines, read_paragraphs, read_tsv
from peftkit.errors import Problem, UserError, did_you_mean, nearest
from peftkit.recipe.paths import COMPRESSED_SUFFIXES, is_glob, path_exists

READERS: dict[str, Callable[[File, int], Iterator[Row | Fault]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_array,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_paragraphs,
    ".md": read_paragraphs,
}
KNOWN_KINDS = f"{', '.join(READERS)}; each also with {' or '.join(COMPRESSED_SUFFIXES)}"
_IGNORED_FILES = ("README*", "LICENSE*", "*.md5")
_SAVED_STATE, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # what datasets.save_to_disk writes


def rows_of_file(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """Yield the rows of one file of a known kind."""
    with translate_read_errors(file):
        yield from READERS[split_suffixes(file.path)[0]](file, limit)


def select_data_files(names: Iterable[str], source_name: str, where: str, *, include_hidden: bool = False) -> list[str]:
    """Return the data files of a folder's files, sorted. Raises UserError for unknown kinds and for none."""
    data_files: list[str] = []
    unknown_files: list[str] = []
    for name in sorted(names, key=lambda name: PurePath(name).parts):
        path = PurePath(name)
        is_ignored = any(fnmatch(path.name, pattern) for pattern in _IGNORED_FILES)
        if not is_ignored and (include_hidden or not any(part.startswith(".") for part in path.parts)):
            (data_files if split_suffixes(Path(name))[0] in READERS else unknown_files).append(name)
    if unknown_files:
        more = [f"{len(unknown_files) - MAX_PROBLEMS} more"] if len(unknown_files) > MAX_PROBLEMS else []
        listed = ", ".join([*unknown_files[:MAX_PROBLEMS], *more])
        raise UserError(
            Problem(
                where, f"{source_name} with {listed}", f"only data files: {KNOWN_KINDS}", "move the others elsewhere"
            )
        )
    if not data_files:
        raise UserError(Problem(where, f"{source_name}, which has no data file", f"files of {KNOWN_KINDS}"))
    return data_files


def local_files(path: str, split: str, where: str) -> list[File]:
    """Return the files of a local path. Raises UserError if there are none, or some of unknown kind."""
    location = Path(path)
    exists = bool(path) and path_exists(location)
    if exists and location.is_file():
        if split_suffixes(location)[0] not in READERS:
            raise UserError(Problem(where, path, f"a file of a known kind: {KNOWN_KINDS}"))
        return [File(location, path)]
    if exists and location.is_dir():
        return _folder_files(location, split, where)
    if exists:
        raise UserError(Problem(where, f"{path}, which is a pipe or a device", "a data file"))
    if is_glob(path):
        matches = {match for match in glob.glob(path, recursive=True) if Path(match).is_file()}  # noqa: PTH207
        if not matches:
            fix = "paths in a recipe are relative to the recipe's folder"
            raise UserError(Problem(where, f"{path}, which matches no file", "a glob that matches", fix))
        return [File(Path(name), name) for name in select_data_files(matches, path, where, include_hidden=True)]
    candidate = Path.cwd() / Path(path).name
    siblings: list[str] = []
    with suppress(OSError):  # a folder that may not be read suggests nothing
        siblings = [sibling.name for sibling in location.parent.iterdir()] if path and location.parent.is_dir() else []
    fix = "paths in a recipe are relative to the recipe's folder"
    if path_exists(candidate):
        fix = f"there is {candidate}: paths in a recipe are relative to the recipe"
    elif similar := nearest(location.name, siblings):
        fix = f"did you mean {location.parent / similar[0]}?"
    raise UserError(Problem(where, f"{path}, which does not exist", "a data file", fix))


def _folder_files(folder: Path, split: str, where: str) -> list[File]:
    """Return the files of a folder; of one written by datasets.save_to_disk, those of the split."""
    if (folder / _SAVED_SPLITS).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{_SAVED_STATE}"))
        if split not in splits:
            got = f"the split {split!r} of {folder}"
            raise UserError(Problem(where, got, f"one of {', '.join(splits)}", did_you_mean(split, splits)))
        return _folder_files(folder / split, split, where)
    if (folder / _SAVED_STATE).is_file() and any(folder.glob("*.arrow")):
        state = json.loads((folder / _SAVED_STATE).read_text(encoding="utf-8"))
        paths = [folder / entry["filename"] for entry in state["_data_files"]]
        return [File(path, str(path)) for path in paths]
    names = select_data_files(_walk_files(folder), str(folder), where)
    return [File(folder / name, str(folder / name)) for name in names]


def _walk_files(folder: Path) -> Iterator[str]:
    """Yield every file below a folder, relative to it; links are followed, but no folder is visited twice."""
    visited = {folder.resolve()}
    for root, folders, names in os.walk(folder, followlinks=True):
        current = Path(root)
        yield from (str((current / name).relative_to(folder)) for name in names)
        targets = {name: (current / name).resolve() for name in folders}
        folders[:] = [name for name in folders if targets[name] not in visited]
        visited.update(targets.values())
