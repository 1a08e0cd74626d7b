"""safetensors files, read and written tensor by tensor: no file is mapped, none is held whole.

Layout: eight bytes of header length, a JSON header of name -> dtype, shape and offsets, then the bytes
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.model.base.file_checks import contained_file, read_json_file, shard_names
from peftkit.ship.files.direct import BLOCK, DirectFile

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own bound
_ENTRY_BYTES = 256  # dtype, shape and offsets of a tensor in the header, at most
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `start` counts bytes from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read the tensor into memory of its own, or into `into`, which is flat, of uint8 and large enough.

        Raises UserError where the file ends before the tensor does.
        """
        raw = torch.empty(self.num_bytes, dtype=torch.uint8) if into is None else into[: self.num_bytes]
        array: Any = raw.numpy()
        view = memoryview(array)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            num_read = 0
            while num_read < len(view):
                count = file.readinto(view[num_read:])
                if not count:
                    raise _damaged_error(self.file, f"{self.name}, which is cut off")
                num_read += count
        return raw.view(self.dtype).reshape(self.shape) if self.num_bytes else torch.empty(self.shape, dtype=self.dtype)


def _damaged_error(file: Path, got: str) -> UserError:
    return UserError(Problem(str(file), got, "a complete safetensors file", "download or write it again"))


def read_entries(file: Path) -> list[TensorEntry]:
    """Read a file's header: its tensors in the order of their bytes. Raises UserError where it is damaged."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length_bytes = handle.read(8)
        length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged_error(file, "no header, or one that is longer than the file")
        text = handle.read(length)
    try:
        header = json.loads(text)
        tensors = [
            _parse_entry(file, name, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged_error(file, f"a header that cannot be read ({error})") from None
    unknown_dtypes = sorted(
        {str(fields["dtype"]) for name, fields in header.items() if name != "__metadata__"} - {*SAFETENSORS_DTYPES}
    )
    if unknown_dtypes:
        got = f"weights of type {', '.join(unknown_dtypes)}"
        raise UserError(Problem(str(file), got, ", ".join(SAFETENSORS_DTYPES), "use the model in 16 or 32 bits"))
    if any(entry.start + entry.num_bytes > size for entry in tensors):
        raise _damaged_error(file, "fewer bytes than its header says")
    return sorted(tensors, key=lambda entry: entry.start)


def _parse_entry(file: Path, name: str, fields: Mapping[str, Any], data_start: int) -> TensorEntry:
    start, end = (int(offset) for offset in fields["data_offsets"])
    shape = tuple(int(size) for size in fields["shape"])
    if fields["dtype"] not in SAFETENSORS_DTYPES:
        return TensorEntry(name, torch.uint8, (end - start,), file, data_start + start)  # reported by read_entries
    entry = TensorEntry(name, SAFETENSORS_DTYPES[fields["dtype"]], shape, file, data_start + start)
    if min(shape, default=0) < 0 or start < 0 or end - start != entry.num_bytes:
        raise ValueError(f"{name} with offsets that do not fit its shape")
    return entry


def safetensors_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder. Raises UserError where it has none."""
    if (folder / INDEX_FILE).is_file():
        index = read_json_file(folder, INDEX_FILE)
        return [folder / name for name in shard_names(index, folder / INDEX_FILE, suffixes=(".safetensors",))]
    if (folder / SINGLE_FILE).is_file():
        return [contained_file(folder, SINGLE_FILE)]
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if len(others) == 1:
        return [contained_file(folder, others[0])]
    raise UserError(Problem(str(folder), "no safetensors weights", f"{SINGLE_FILE}, or several with an index"))


def read_all_entries(files: list[Path]) -> dict[str, TensorEntry]:
    """Return name -> entry over all files, file by file, each in the order of its bytes."""
    return {entry.name: entry for file in files for entry in read_entries(file)}


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers are finite, by minimum and maximum (NaN is both): no copy is made."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def refuse_non_finite(tensors: Mapping[str, TensorEntry]) -> None:
    """Raise UserError where an adapter holds NaN or infinity."""
    for entry in tensors.values():
        if entry.dtype.is_floating_point and not is_finite(entry.read()):
            got = f"{entry.name} with NaN or infinity"
            raise UserError(Problem(str(entry.file), got, "finite weights", "train it again"))


class SafetensorsWriter:
    """Writer of one file, tensor by tensor; the header is filled in at the end.

    A tensor is written while its successor is computed: it must not be changed before the next but one is
    put. `names` are those of all tensors to come, for which room is kept in the header. A `with` that ends in
    an error leaves no valid safetensors file.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path = path
        # a character takes up to six in JSON
        room = 8 + _ENTRY_BYTES + sum(_ENTRY_BYTES + 6 * len(name) for name in names)
        self._room = -(-room // BLOCK) * BLOCK
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offset = 0
        self._thread = ThreadPoolExecutor(1)
        self._future: Future[None] | None = None
        self.written: dict[str, int] = {}  # name -> bytes

    def __enter__(self) -> SafetensorsWriter:
        self._file = DirectFile(self._path, room=self._room)
        return self

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        end = self._offset + flat.numel()
        offsets = [self._offset, end]
        fields = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._header[name], self._offset, self.written[name] = fields, end, flat.numel()
        self._wait()
        self._future = self._thread.submit(self._file.write, flat)

    def _wait(self) -> None:
        """Wait until the last tensor is written; raise what that raised."""
        if self._future is not None:
            pending, self._future = self._future, None
            pending.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
                text = json.dumps(self._header).encode().ljust(self._room - 8)
                if len(text) > self._room - 8:
                    raise PeftkitError(f"{self._path.name}: more tensors were written than were announced")
                self._file.finish(struct.pack("<Q", len(text)) + text)
        finally:
            self._thread.shutdown()
            self._file.close()


def shard_index(files: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return the index of a sharded model from file -> tensor -> bytes."""
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    total = sum(sum(tensors.values()) for tensors in files.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
