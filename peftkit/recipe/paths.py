"""Paths of a recipe: relative to the file that states them, or on the command line to the current folder."""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable
from pathlib import Path

from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.recipe.schema import AnySource, Recipe, Source

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
COMPRESSED_SUFFIXES = (".gz", ".zst")
_COMMIT = re.compile("[0-9a-f]{40}")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.:-]*://")
_GLOB = re.compile(r"[*?]|\[.*/|/.*\[")  # a bracket alone is a slice of a hub split: train[:10%]
_SECRETS = re.compile(r"(?<=://)(?:[^/\s]*|[^/\s@]*:(?!//)(?:(?!://)[^\s'\"@])*)@|[?#][^\s'\"]*")


# small data that comes with peftkit, as sample:NAME: a new recipe works as it is
SAMPLES = {"chats": "banking77-10.train.jsonl", "classes": "banking77.train.csv"}
_SAMPLE = "sample:"
_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder() -> Path:
    """Return `recipes/` of a clone, or the copy inside an installed package."""
    installed = _PACKAGE / "shipped_recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit, whose content cannot change; branches and tags can."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_url(text: str) -> bool:
    """Return whether a source is fetched from elsewhere: https://, s3://, ..."""
    return _URL.match(text) is not None


def is_glob(text: str) -> bool:
    """Return whether a path is a pattern that may match several files."""
    return _GLOB.search(text) is not None


def redact_url(text: str) -> str:
    """Return a source as it may be printed: URLs without user, password and query, which may be secret."""
    return _SECRETS.sub("", text) if "://" in text else text


def is_data_path(text: str, folder: Path | None = None) -> bool:
    """Return whether a data source is a file, folder, glob or URL rather than a hub id.

    `folder` is what relative paths are relative to: with it, anything that exists there counts too.
    """
    if is_url(text) or is_glob(text) or text.startswith((".", "/", "~")):
        return True
    if text.lower().endswith((*DATA_SUFFIXES, *COMPRESSED_SUFFIXES)):
        return True
    return bool(text) and folder is not None and path_exists(folder / text)


def is_model_path(text: str, folder: Path) -> bool:
    """Return whether a base is a folder or file rather than a hub id or an embedded name."""
    if text.startswith("embedded:"):
        return False
    return text.endswith(".gguf") or text.startswith((".", "/", "~")) or path_exists(folder / text)


def path_exists(path: Path) -> bool:
    """Return whether a path exists; False, not an error, for names that no file can have."""
    return os.path.exists(path)  # noqa: PTH110


def absolute_path(text: str, folder: Path) -> str:
    """Return a path of a recipe as an absolute one."""
    return str((folder / os.path.expanduser(text)).resolve())  # noqa: PTH111  Path's raises for unknown users


def with_absolute_paths(recipe: Recipe, folder: Callable[..., Path]) -> Recipe:
    """Return the recipe with every path absolute; `folder(*key)` is what a key's paths are relative to."""
    base, data = recipe.base, recipe.data
    if is_model_path(base.id, folder("base", "id")):
        base = base.model_copy(update={"id": absolute_path(base.id, folder("base", "id"))})
    sources = data.train if isinstance(data.train, list) else [data.train]
    train = [_absolute_source(source, folder("data", "train")) for source in sources]
    update: dict[str, object] = {"train": train}
    if isinstance(data.eval, str | Source):
        # beside hub data alone, a bare word is a split, whatever folder may be called so
        files = isinstance(data.eval, Source) or any(
            is_data_path(source.path if isinstance(source, Source) else source) for source in train
        )
        update["eval"] = _absolute_source(data.eval, folder("data", "eval"), folders=files)
    if data.chat.template is not None:
        template = absolute_path(data.chat.template, folder("data", "chat", "template"))
        update["chat"] = data.chat.model_copy(update={"template": template})
    changed: dict[str, object] = {"base": base, "data": data.model_copy(update=update)}
    if recipe.start_from is not None:
        changed["start_from"] = absolute_path(recipe.start_from, folder("start_from"))
    return recipe.model_copy(update=changed)


def _absolute_source(source: AnySource, folder: Path, *, folders: bool = True) -> AnySource:
    """Return the source with an absolute path, if it is a path."""
    if isinstance(source, Source):
        return source.model_copy(update={"path": _absolute_source(source.path, folder)})
    if source.startswith(_SAMPLE):
        name = source.removeprefix(_SAMPLE)
        if name not in SAMPLES:
            raise UserError(Problem("data", source, "a sample of peftkit", did_you_mean(name, list(SAMPLES))))
        return str(shipped_folder() / "data" / SAMPLES[name])
    if is_url(source) or not is_data_path(source, folder if folders else None):
        return source
    return absolute_path(source, folder)
