"""Rows of anything: files, folders, globs, URLs and hub datasets, lazily. The only home of `datasets`."""

from __future__ import annotations

from peftkit.data.read.hub import mapped_dataset, to_dataset
from peftkit.data.read.rows import MAX_PROBLEMS, Fault, Row
from peftkit.data.read.sources import Located, content_key, read, read_rows

__all__ = [
    "MAX_PROBLEMS",
    "Fault",
    "Located",
    "Row",
    "content_key",
    "mapped_dataset",
    "read",
    "read_rows",
    "to_dataset",
]
