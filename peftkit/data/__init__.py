"""Data: read with line numbers, brought to one shape, rendered, tokenized, masked."""

from peftkit.data.prepare import Prepared, prepare
from peftkit.data.read import Row, read_rows, to_dataset

__all__ = ["Prepared", "Row", "prepare", "read_rows", "to_dataset"]
