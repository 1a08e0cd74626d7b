"""Hub datasets: the only place that imports `datasets`. No code of a dataset is ever run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftkit.data.read.rows import Fault, File, Row
from peftkit.data.read.tables import rows_of_batches
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.hub import hub_is_offline, probe_hub
from peftkit.recipe.schema import Source

_BATCH_ROWS = 128
_AVAILABLE = re.compile(
    r"(?:available configs|Available configs in the cache|Available|Should be one of):? (\[[^\]]*\])"
)


def load_hub_dataset(source: Source, where: str) -> Any:
    """Load the `datasets.Dataset` of a hub id, once per process. Raises UserError if it cannot be loaded."""
    if not hub_is_offline() and not probe_hub():
        got = f"the hub dataset {source.path!r} while the hub cannot be reached"
        fix = "give a file, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        raise UserError(Problem(where, got, "data that is available", fix))
    return _load_cached(source.path, source.config, source.split, source.revision, where)


@lru_cache(maxsize=8)
def _load_cached(name: str, config: str | None, split: str, revision: str | None, where: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:
        # datasets raises a dozen unrelated types for the same thing: it cannot be had
        message = str(error)
        if match := _AVAILABLE.search(message):
            names = re.findall(r"'([^']*)'", match[1])
            is_split = message.startswith("Unknown split")
            value, key = (split, "split") if is_split else (config, "config")
            got = f"the hub dataset {name!r} with {'no' if value is None else 'the'} {key} {value or ''}".rstrip()
            fix = did_you_mean(value, names) if value else f"for example config: {names[0]}" if names else ""
            load_problem = Problem(where, got, f"a {key} of {', '.join(names)}", fix)
        elif hub_is_offline() and isinstance(error, ConnectionError):
            got = f"the hub dataset {name!r} while HF_HUB_OFFLINE is set"
            load_problem = Problem(where, got, "data that is available", "give a file, or unset HF_HUB_OFFLINE")
        else:
            reason = (message.splitlines() or [type(error).__name__])[0][:160]
            got = f"the hub dataset {name!r} [{split}] ({reason})"
            load_problem = Problem(where, got, "a dataset that can be read", "check the name and split, or give a file")
        raise UserError(load_problem) from error


def hub_rows(source: Source, where: str) -> Iterator[Row | Fault]:
    """Yield the rows of a hub dataset, batch by batch from its Arrow files."""
    arrow_dataset = load_hub_dataset(source, where).with_format("arrow")
    file = File(Path(), f"{source.path}[{source.split}]")
    return rows_of_batches(file, arrow_dataset.features.arrow_schema, arrow_dataset.iter(_BATCH_ROWS))


def hub_key(source: Source, where: str) -> str:
    """Return a sha256 of the fingerprint that `datasets` gives the content, with config and split."""
    parts = (load_hub_dataset(source, where)._fingerprint, source.config or "", source.split)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def mapped_dataset(paths: Sequence[Path], columns: Sequence[str]) -> Any:
    """Return a `datasets.Dataset` of some columns of Arrow streams, memory-mapped: nothing is read."""
    import datasets

    parts = [datasets.Dataset.from_file(str(path)) for path in paths]
    combined = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return combined.select_columns(list(columns))


def dataset_from_rows(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return tokenized rows as a `datasets.Dataset`, as the trainer expects them."""
    import datasets

    return datasets.Dataset.from_list([dict(row) for row in rows])
