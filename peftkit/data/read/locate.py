"""Which files stand behind a path, a folder or a glob. None is passed over in silence."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePath

from peftkit.data.read.rows import MAX_PROBLEMS, Fault, File, Row
from peftkit.data.read.streams import MAX_LINE_BYTES, reading, suffixes
from peftkit.data.read.tables import arrow, parquet
from peftkit.data.read.texts import json_array, json_lines, paragraphs, tabbed, table
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.recipe.paths import COMPRESSED_SUFFIXES, is_glob, stands

READERS: dict[str, Callable[[File, int], Iterator[Row | Fault]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_array,
    ".csv": table,
    ".tsv": tabbed,
    ".parquet": parquet,
    ".arrow": arrow,
    ".txt": paragraphs,
    ".md": paragraphs,
}
KNOWN = f"{', '.join(READERS)}; each also with {' or '.join(COMPRESSED_SUFFIXES)}"
_BESIDE_DATA = ("README*", "LICENSE*", "*.md5")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # what datasets.save_to_disk writes


def rows_of_file(file: File, limit: int = MAX_LINE_BYTES) -> Iterator[Row | Fault]:
    """The rows of one file of a known kind."""
    with reading(file):
        yield from READERS[suffixes(file.path)[0]](file, limit)


def chosen(names: Iterable[str], shown: str, where: str, *, hidden: bool = False) -> list[str]:
    """The data files among a folder's, sorted. Raises UserError for files of unknown kind, and for none."""
    known: list[str] = []
    strays: list[str] = []
    for name in sorted(names, key=lambda name: PurePath(name).parts):
        path = PurePath(name)
        beside = any(fnmatch(path.name, pattern) for pattern in _BESIDE_DATA)
        if not beside and (hidden or not any(part.startswith(".") for part in path.parts)):
            (known if suffixes(Path(name))[0] in READERS else strays).append(name)
    if strays:
        more = [f"{len(strays) - MAX_PROBLEMS} more"] if len(strays) > MAX_PROBLEMS else []
        listed = ", ".join([*strays[:MAX_PROBLEMS], *more])
        raise UserError(
            Problem(
                where, f"{shown} with {listed}", f"data files alone: {KNOWN}", "move the others elsewhere"
            )
        )
    if not known:
        raise UserError(Problem(where, f"{shown}, in which there is no data file", f"files of {KNOWN}"))
    return known


def local_files(path: str, split: str, where: str) -> list[File]:
    """The files behind a local path. Raises UserError where there are none, or some of unknown kind."""
    place = Path(path)
    there = bool(path) and stands(place)
    if there and place.is_file():
        if suffixes(place)[0] not in READERS:
            raise UserError(Problem(where, path, f"a file of a known kind: {KNOWN}"))
        return [File(place, path)]
    if there and place.is_dir():
        return _of_folder(place, split, where)
    if there:
        raise UserError(Problem(where, f"{path}, which is a pipe or a device", "a data file"))
    if is_glob(path):
        found = {match for match in glob.glob(path, recursive=True) if Path(match).is_file()}  # noqa: PTH207
        if not found:
            fix = "paths in a recipe are relative to the recipe's folder"
            raise UserError(Problem(where, f"{path}, which matches no file", "a glob that matches", fix))
        return [File(Path(name), name) for name in chosen(found, path, where, hidden=True)]
    raise _not_there(path, where)


def _not_there(path: str, where: str) -> UserError:
    here = Path.cwd() / Path(path).name
    fix = (
        f"there is {here}: paths in a recipe are relative to the recipe"
        if stands(here)
        else "paths in a recipe are relative to the recipe's folder"
    )
    return UserError(Problem(where, f"{path}, which is not there", "a data file", fix))


def _of_folder(folder: Path, split: str, where: str) -> list[File]:
    """The files of a folder; of one by datasets.save_to_disk, those of the split."""
    if (folder / _SAVED_SPLITS).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{_SAVED}"))
        if split not in splits:
            got = f"the split {split!r} of {folder}"
            raise UserError(Problem(where, got, f"one of {', '.join(splits)}", did_you_mean(split, splits)))
        return _of_folder(folder / split, split, where)
    if (folder / _SAVED).is_file() and any(folder.glob("*.arrow")):
        state = json.loads((folder / _SAVED).read_text(encoding="utf-8"))
        paths = [folder / entry["filename"] for entry in state["_data_files"]]
        return [File(path, str(path)) for path in paths]
    names = chosen(_below(folder), str(folder), where)
    return [File(folder / name, str(folder / name)) for name in names]


def _below(folder: Path) -> Iterator[str]:
    """Every file below a folder, through links too but never in a circle, relative to it."""
    seen = {folder.resolve()}
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        yield from (str((here / name).relative_to(folder)) for name in names)
        inner = {name: (here / name).resolve() for name in folders}
        folders[:] = [name for name in folders if inner[name] not in seen]
        seen.update(inner.values())
