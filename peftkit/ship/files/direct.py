"""File writer that bypasses the page cache where the file system allows it, so that a merge evicts nothing.

Direct writes go in whole blocks from memory that is aligned to them; the excess at the end is cut off.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import torch

BLOCK = 4096
_BUFFER_BYTES = 8 * 2**20


class DirectFile:
    """A file of the bytes passed to `write`, after room at the start that `finish` fills."""

    def __init__(self, path: Path, *, room: int) -> None:
        assert room % BLOCK == 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._handle = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
            self._handle = os.open(path, flags, 0o644)  # a file system in memory, for one
        self._memory = mmap.mmap(-1, _BUFFER_BYTES)  # aligned to pages, as direct writes ask for
        self._buffer = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._filled, self._offset, self._room = 0, room, room

    def write(self, flat: torch.Tensor) -> None:
        """Append a flat uint8 tensor. Raises OSError as the disk does."""
        num_copied = 0
        while num_copied < len(flat):
            part = flat[num_copied : num_copied + _BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)].copy_(part)
            self._filled += len(part)
            num_copied += len(part)
            if self._filled == _BUFFER_BYTES:
                self._flush(_BUFFER_BYTES)

    def _flush(self, num_bytes: int) -> None:
        _pwrite_all(self._handle, memoryview(self._memory)[:num_bytes], self._offset)
        self._offset += num_bytes
        self._filled = 0

    def finish(self, header: bytes) -> None:
        """Write what is left, cut the file to its length, and put `header` at the start."""
        assert len(header) == self._room
        size = self._offset + self._filled
        if self._filled:
            self._flush(-(-self._filled // BLOCK) * BLOCK)
        os.ftruncate(self._handle, size)
        with mmap.mmap(-1, len(header)) as memory:
            memory[:] = header
            with memoryview(memory) as view:
                _pwrite_all(self._handle, view, 0)

    def close(self) -> None:
        """Close the file, complete or not."""
        os.close(self._handle)


def _pwrite_all(handle: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`.

    Direct writes end where a part was written (no room, a limit): the rest goes through plain ones.
    """
    num_written = 0
    while num_written < len(view):
        try:
            num_written += os.pwrite(handle, view[num_written:], offset + num_written)
        except OSError as error:
            flags = fcntl.fcntl(handle, fcntl.F_GETFL)
            direct = getattr(os, "O_DIRECT", 0)
            if error.errno != errno.EINVAL or not flags & direct:
                raise
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~direct)
