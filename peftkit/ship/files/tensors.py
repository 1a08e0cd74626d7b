"""safetensors files read and written tensor by tensor: no file is mapped, none is held whole.

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
from peftkit.model.base.file_checks import contained_file, plain_names, read_json_file
from peftkit.ship.files.direct import BLOCK, DirectFile

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own bound
_ABOUT_BYTES = 256  # dtype, shape and offsets of a tensor in the header, at most
DTYPES = {
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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` counts from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Its numbers, in memory of their own or in that of `into`, which is flat, of uint8 and large enough.

        Raises UserError where the file ends before they do.
        """
        raw = torch.empty(self.num_bytes, dtype=torch.uint8) if into is None else into[: self.num_bytes]
        view = _bytes_of(raw)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise _damaged(self.file, f"{self.name}, which is cut off")
                done += got
        return raw.view(self.dtype).reshape(self.shape) if self.num_bytes else _empty(self)


def _empty(entry: Entry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype)


def _bytes_of(flat: torch.Tensor) -> memoryview:
    """The memory of a flat uint8 tensor."""
    array: Any = flat.numpy()
    return memoryview(array)


def _damaged(file: Path, got: str) -> UserError:
    return UserError(Problem(str(file), got, "a whole safetensors file", "fetch or write it again"))


def entries(file: Path) -> list[Entry]:
    """The tensors of a file, in the order of their bytes. Raises UserError where it is damaged."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(file, "no header, or one that is longer than the file")
        text = opened.read(length)
    try:
        header = json.loads(text)
        found = [
            _entry(file, name, about, 8 + length) for name, about in header.items() if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"a header that cannot be read ({error})") from None
    strange = sorted(
        {str(about["dtype"]) for name, about in header.items() if name != "__metadata__"} - {*DTYPES}
    )
    if strange:
        got = f"weights of type {', '.join(strange)}"
        raise UserError(Problem(str(file), got, ", ".join(DTYPES), "use the model in 16 or 32 bits"))
    if any(entry.start + entry.num_bytes > size for entry in found):
        raise _damaged(file, "fewer bytes than its header promises")
    return sorted(found, key=lambda entry: entry.start)


def _entry(file: Path, name: str, about: Mapping[str, Any], begin: int) -> Entry:
    start, end = (int(offset) for offset in about["data_offsets"])
    shape = tuple(int(size) for size in about["shape"])
    if about["dtype"] not in DTYPES:
        return Entry(name, torch.uint8, (end - start,), file, begin + start)  # told of by `entries`
    entry = Entry(name, DTYPES[about["dtype"]], shape, file, begin + start)
    if min(shape, default=0) < 0 or start < 0 or end - start != entry.num_bytes:
        raise ValueError(f"{name} with offsets that do not fit its shape")
    return entry


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's folder that hold its weights. Raises UserError where it has none."""
    if (folder / INDEX).is_file():
        index = read_json_file(folder, INDEX)
        return [folder / name for name in plain_names(index, folder / INDEX, suffixes=(".safetensors",))]
    if (folder / SINGLE).is_file():
        return [contained_file(folder, SINGLE)]
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if len(others) == 1:
        return [contained_file(folder, others[0])]
    raise UserError(Problem(str(folder), "no safetensors weights", f"{SINGLE}, or several with an index"))


def read_all(files: list[Path]) -> dict[str, Entry]:
    """Name -> tensor over all files, file by file, each in the order of its bytes."""
    return {entry.name: entry for file in files for entry in entries(file)}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are, by the least and the largest: NaN is both, and no other tensor is made."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def refuse_non_finite(tensors: Mapping[str, Entry]) -> None:
    """Raises UserError where an adapter holds NaN or infinity."""
    for entry in tensors.values():
        if entry.dtype.is_floating_point and not is_finite(entry.read()):
            got = f"{entry.name} with NaN or infinity"
            raise UserError(Problem(str(entry.file), got, "finite weights", "train it again"))


class Writer:
    """Writes one file tensor by tensor, as they come; the header is filled in at the end.

    While a tensor is written its successor is computed: none is to be changed before the next but one is put.
    `names` are those of all tensors to come: room for the header is kept for them. What a `with` that ends in
    an error leaves behind is no safetensors file.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path = path
        # a character takes up to six in JSON
        room = 8 + _ABOUT_BYTES + sum(_ABOUT_BYTES + 6 * len(name) for name in names)
        self._room = -(-room // BLOCK) * BLOCK
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offset = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self.written: dict[str, int] = {}  # name -> bytes

    def __enter__(self) -> Writer:
        self._file = DirectFile(self._path, room=self._room)
        return self

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        end = self._offset + flat.numel()
        offsets = [self._offset, end]
        about = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._header[name], self._offset, self.written[name] = about, end, flat.numel()
        self._wait()
        self._writing = self._thread.submit(self._file.write, flat)

    def _wait(self) -> None:
        """Until what was put is written. Raises what that raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
                text = json.dumps(self._header).encode().ljust(self._room - 8)
                if len(text) > self._room - 8:
                    raise PeftkitError(f"{self._path.name}: more tensors were written than it was made for")
                self._file.finish(struct.pack("<Q", len(text)) + text)
        finally:
            self._thread.shutdown()
            self._file.close()


def index_of(files: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The index of a sharded model from file -> tensor -> bytes."""
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    total = sum(sum(tensors.values()) for tensors in files.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
