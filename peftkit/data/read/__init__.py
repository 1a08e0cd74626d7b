"""Lazy readers of rows: files, folders, globs, URLs and hub datasets. Only here is `datasets` imported."""

from __future__ import annotations

from peftkit.data.read.hub import dataset_from_rows, mapped_dataset
from peftkit.data.read.rows import MAX_PROBLEMS, Fault, Row
from peftkit.data.read.sources import LocatedSource, content_key, read, read_rows

__all__ = [
    "MAX_PROBLEMS",
    "Fault",
    "LocatedSource",
    "Row",
    "content_key",
    "dataset_from_rows",
    "mapped_dataset",
    "read",
    "read_rows",
]
