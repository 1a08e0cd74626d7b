"""Hub datasets: the only home of `datasets`. No code of a dataset is ever run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftkit.data.read.rows import Fault, File, Row
from peftkit.data.read.tables import rows_of
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.hub import hub_answers, hub_is_off
from peftkit.recipe.schema import Source

_BATCH = 128
_KNOWN = re.compile(
    r"(?:available configs|Available configs in the cache|Available|Should be one of):? (\[[^\]]*\])"
)


def dataset(source: Source, where: str) -> Any:
    """The `datasets.Dataset` behind a hub id, loaded once. Raises UserError where it cannot be had."""
    if not hub_is_off() and not hub_answers():
        got = f"the hub dataset {source.path!r} while the hub cannot be reached"
        fix = "give a file, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        raise UserError(Problem(where, got, "data at hand", fix))
    return _loaded(source.path, source.config, source.split, source.revision, where)


@lru_cache(maxsize=8)
def _loaded(name: str, config: str | None, split: str, revision: str | None, where: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:
        # datasets raises a dozen unrelated types for the same thing: it cannot be had
        raise UserError(_problem(name, config, split, where, error)) from error


def _problem(name: str, config: str | None, split: str, where: str, error: Exception) -> Problem:
    """Why a dataset cannot be had, with the configs or splits there are where the library tells them."""
    said = str(error)
    if known := _KNOWN.search(said):
        names = re.findall(r"'([^']*)'", known[1])
        is_split = said.startswith("Unknown split")
        asked, key = (split, "split") if is_split else (config, "config")
        got = f"the hub dataset {name!r} with {'no' if asked is None else 'the'} {key} {asked or ''}".rstrip()
        fix = did_you_mean(asked, names) if asked else f"for example config: {names[0]}" if names else ""
        return Problem(where, got, f"a {key} of {', '.join(names)}", fix)
    if hub_is_off() and isinstance(error, ConnectionError):
        got = f"the hub dataset {name!r} while HF_HUB_OFFLINE is set"
        return Problem(where, got, "data at hand", "give a file, or unset HF_HUB_OFFLINE")
    first = (said.splitlines() or [type(error).__name__])[0][:160]
    got = f"the hub dataset {name!r} [{split}] ({first})"
    return Problem(where, got, "a dataset that can be read", "check the name and split, or give a file")


def hub_rows(source: Source, where: str) -> Iterator[Row | Fault]:
    """The rows of a hub dataset, batch by batch from its Arrow files."""
    found = dataset(source, where).with_format("arrow")
    file = File(Path(), f"{source.path}[{source.split}]")
    return rows_of(file, found.features.arrow_schema, found.iter(_BATCH))


def hub_key(source: Source, where: str) -> str:
    """A digest of a hub dataset's content: of what `datasets` knows it by, with its config and split."""
    parts = (dataset(source, where)._fingerprint, source.config or "", source.split)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def mapped_dataset(paths: Sequence[Path], columns: Sequence[str]) -> Any:
    """A `datasets.Dataset` of some columns of Arrow streams, mapped: nothing is read into memory."""
    import datasets

    parts = [datasets.Dataset.from_file(str(path)) for path in paths]
    found = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return found.select_columns(list(columns))


def to_dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A `datasets.Dataset` of tokenized rows, as the trainer wants it."""
    import datasets

    return datasets.Dataset.from_list([dict(row) for row in rows])
