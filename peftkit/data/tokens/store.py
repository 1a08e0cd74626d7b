"""Tokenized rows on disk: memory-mapped Arrow streams of token ids, labels, weights and row origins."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from peftkit.data.rows.lazy import LazySequence
from peftkit.data.tokens.mask import Tokenized

_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [
        ("input_ids", _IDS),
        ("labels", _IDS),
        ("weights", pa.list_(pa.float32())),
        ("where", pa.string()),
        ("example", pa.int64()),  # its number among the examples
        ("num_tokens", pa.int32()),
        ("num_labels", pa.int32()),
        ("num_learnt", pa.int32()),
    ]
)


def _list_column(rows: Sequence[Sequence[Any]], code: str) -> pa.Array:
    """Build an Arrow column of lists from one flat array."""
    offsets = np.fromiter(accumulate((len(row) for row in rows), initial=0), np.int32, len(rows) + 1)
    flat = array(code)  # quicker than numpy with Python's numbers
    for row in rows:
        flat.extend(row)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.frombuffer(flat, code)))


class TokenWriter:
    """Writer of tokenized rows to one Arrow stream."""

    def __init__(self, path: Path) -> None:
        self._writer = pa.ipc.new_stream(str(path), _SCHEMA)
        self.num_rows = 0

    def write(self, rows: Sequence[Tokenized], examples: Sequence[int]) -> None:
        """Write a batch of rows, each with the number of the example that it comes from."""
        if not rows:
            return
        has_weights = any(row.weights is not None for row in rows)
        weights = [row.weights or [1.0] * len(row.labels) for row in rows] if has_weights else []
        no_weights = pa.nulls(len(rows), pa.list_(pa.float32()))
        batch = pa.record_batch(
            [
                _list_column([row.input_ids for row in rows], "i"),
                _list_column([row.labels for row in rows], "i"),
                _list_column(weights, "f") if has_weights else no_weights,
                pa.array([row.where for row in rows]),
                pa.array(examples, pa.int64()),
                pa.array([len(row.input_ids) for row in rows], pa.int32()),
                pa.array([len(row.labels) for row in rows], pa.int32()),
                pa.array([row.num_learnt for row in rows], pa.int32()),
            ],
            schema=_SCHEMA,
        )
        self._writer.write_batch(batch)
        self.num_rows += len(rows)

    def close(self) -> None:
        """Finish the stream."""
        self._writer.close()


@dataclass(frozen=True)
class Counts:
    """Counts per row, each of shape (rows,): tokens, labels, and labels in the loss."""

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    learnt: NDArray[np.int32]

    @classmethod
    def of(cls, rows: Sequence[Tokenized]) -> Counts:
        """Count any rows; those of a store are counted already."""
        if isinstance(rows, StoredTokens):
            return rows.counts
        columns = zip(*((len(r.input_ids), len(r.labels), r.num_learnt) for r in rows), strict=True)
        arrays = [np.array(column, np.int32) for column in columns] or [np.empty(0, np.int32)] * 3
        return cls(*arrays)


class StoredTokens(LazySequence[Tokenized]):
    """Memory-mapped rows of Arrow streams: a row is read on access."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in paths]
        self.table: pa.Table = pa.concat_tables(tables) if tables else _SCHEMA.empty_table()
        batches = self.table.to_batches()
        self._starts = [*accumulate((len(batch) for batch in batches), initial=0)]
        self._columns = [{name: batch.column(name) for name in _SCHEMA.names} for batch in batches]
        self.counts = Counts(*(self._int_column(name) for name in ("num_tokens", "num_labels", "num_learnt")))

    def _int_column(self, name: str) -> NDArray[Any]:
        return np.asarray(self.table.column(name).to_numpy())

    @property
    def examples(self) -> NDArray[np.int64]:
        """Return the number of each row's example."""
        return self._int_column("example")

    @property
    def is_weighted(self) -> bool:
        """Return True where some row's tokens have different weights."""
        return bool(self.table.column("weights").null_count < len(self))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def _load(self, number: int) -> Tokenized:
        batch = bisect_right(self._starts, number) - 1
        columns, index = self._columns[batch], number - self._starts[batch]
        weights = columns["weights"][index]
        return Tokenized(
            columns["input_ids"][index].values.to_numpy().tolist(),
            columns["labels"][index].values.to_numpy().tolist(),
            columns["where"][index].as_py(),
            weights.values.to_numpy().tolist() if weights.is_valid else None,
        )


def is_weighted(rows: Sequence[Tokenized]) -> bool:
    """Return True where some row's labels have different weights in the loss."""
    return rows.is_weighted if isinstance(rows, StoredTokens) else any(row.weights for row in rows)


def content_sha256(paths: Sequence[Path]) -> str:
    """Hash what is trained on: ids, labels and weights in order, wherever the rows came from."""
    digests = {name: (hashlib.sha256(), hashlib.sha256()) for name in ("input_ids", "labels", "weights")}
    for path in paths:
        for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
            for name, (lengths, values) in digests.items():
                column = batch.column(name)
                lengths.update(column.value_lengths().fill_null(-1).to_numpy().tobytes())
                values.update(column.flatten().to_numpy().tobytes())
        for lengths, _ in digests.values():
            lengths.update(b"end of a set")
    parts = [part.digest() for pair in digests.values() for part in pair]
    return hashlib.sha256(b"".join(parts)).hexdigest()
