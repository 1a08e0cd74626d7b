"""Paths in a recipe are relative to the file that states them; on the command line, to the current folder."""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable
from pathlib import Path

from peftkit.recipe.schema import AnySource, Recipe, Source

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
COMPRESSED_SUFFIXES = (".gz", ".zst")
_COMMIT = re.compile("[0-9a-f]{40}")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.:-]*://")
_GLOB = re.compile(r"[*?]|\[.*/|/.*\[")  # a bracket alone is a slice of a hub split: train[:10%]
_SECRETS = re.compile(r"(?<=://)(?:[^/\s]*|[^/\s@]*:(?!//)(?:(?!://)[^\s'\"@])*)@|[?#][^\s'\"]*")


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, whose content cannot change; branches and tags can."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_url(text: str) -> bool:
    """Whether a source is fetched from elsewhere: https://, s3://, ..."""
    return _URL.match(text) is not None


def is_glob(text: str) -> bool:
    """Whether a path is a pattern that may match many."""
    return _GLOB.search(text) is not None


def shown(text: str) -> str:
    """A source as it may be printed: URLs without user, password and query, which may be secret."""
    return _SECRETS.sub("", text) if "://" in text else text


def is_data_path(text: str, folder: Path | None = None) -> bool:
    """Whether a data source is a file, folder, glob or URL rather than a hub id.

    `folder` is what relative paths are relative to: with it, what stands there counts too.
    """
    if is_url(text) or is_glob(text) or text.startswith((".", "/", "~")):
        return True
    if text.lower().endswith((*DATA_SUFFIXES, *COMPRESSED_SUFFIXES)):
        return True
    return bool(text) and folder is not None and stands(folder / text)


def is_model_path(text: str, folder: Path) -> bool:
    """Whether a base is a folder or file rather than a hub id or an embedded name."""
    if text.startswith("embedded:"):
        return False
    return text.endswith(".gguf") or text.startswith((".", "/", "~")) or stands(folder / text)


def stands(path: Path) -> bool:
    """Whether something is there. False for what no file can be called, for which Path's own raises."""
    return os.path.exists(path)  # noqa: PTH110


def _absolute(text: str, folder: Path) -> str:
    return str((folder / os.path.expanduser(text)).resolve())  # noqa: PTH111  Path's raises for unknown users


def anchored(recipe: Recipe, folder: Callable[..., Path]) -> Recipe:
    """The recipe with every path made absolute; `folder(*key)` is what a key's paths are relative to."""
    base, data = recipe.base, recipe.data
    if is_model_path(base.id, folder("base", "id")):
        base = base.model_copy(update={"id": _absolute(base.id, folder("base", "id"))})
    given = data.train if isinstance(data.train, list) else [data.train]
    train = [_anchored(source, folder("data", "train")) for source in given]
    update: dict[str, object] = {"train": train}
    if isinstance(data.eval, str | Source):
        # beside hub data alone, a bare word is a split, whatever folder may be called so
        files = isinstance(data.eval, Source) or any(is_data_path(_path(source)) for source in train)
        update["eval"] = _anchored(data.eval, folder("data", "eval"), folders=files)
    if data.chat.template is not None:
        template = _absolute(data.chat.template, folder("data", "chat", "template"))
        update["chat"] = data.chat.model_copy(update={"template": template})
    return recipe.model_copy(update={"base": base, "data": data.model_copy(update=update)})


def _path(source: AnySource) -> str:
    return source.path if isinstance(source, Source) else source


def _anchored(source: AnySource, folder: Path, *, folders: bool = True) -> AnySource:
    """The source with an absolute path, where it is a path."""
    if isinstance(source, Source):
        return source.model_copy(update={"path": _anchored(source.path, folder)})
    if is_url(source) or not is_data_path(source, folder if folders else None):
        return source
    return _absolute(source, folder)
