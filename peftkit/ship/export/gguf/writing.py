"""GGUF file writer: the header, then one tensor at a time; complete at the end, or absent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.errors import Problem, UserError
from peftkit.rundir import is_disk_full, require_free_space

GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")  # what is written here
# what llama-quantize makes of an f16 or bf16 file without an importance matrix
QUANTIZED_DTYPES = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs"),
)
FILE_TYPES: Mapping[str, str] = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK_BYTES = 16 * 2**20  # of fp32 numbers that are converted at a time
_ROOM_HINT = "make room, or give an output on another disk"


@dataclass(frozen=True)
class GgufFile:
    """A finished file; `notes` are for the user."""

    path: Path
    num_bytes: int
    num_tensors: int
    dtype: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write: `shape` has rows first, `load` returns it in any dtype and in llama.cpp's layout."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # f32 | f16 | bf16 | q8_0
    load: Callable[[], Any]


def require_gguf(where: str) -> Any:
    """Import the gguf package. Raises UserError with the pip line where it is missing."""
    try:
        import gguf
    except ImportError:
        got, fix = "a GGUF export without the gguf package", "pip install 'peftkit[gguf]'"
        raise UserError(Problem(where, got, "an installed gguf", fix)) from None
    return gguf


def part_path(out: Path) -> Path:
    """Return the path that an output is written to until it is complete."""
    return out.with_name(f"{out.name}.part")


@contextmanager
def publish_file(out: Path) -> Iterator[Path]:
    """Yield `OUT.part` to write into; it becomes `out`, or is removed.

    Raises UserError where `out` exists, before and after: nothing is overwritten.
    """
    _refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(out)
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        _refuse_existing(out)
        part.rename(out)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(Problem(str(out), "an existing file", "a new name", "remove it, or choose another name"))


def write_file(
    part: Path,
    architecture: str,
    fields: Mapping[str, object],
    entries: Sequence[GgufTensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a GGUF file and return its bytes; `progress` is called with bytes written and bytes in all.

    `fields` map header keys to bool, int (32 bits unsigned), float (32 bits), str, or lists of them.
    Raises UserError where the disk has no room, which is checked as soon as the header is written, and where
    a number has no finite value in the target dtype.
    """
    try:
        # everything before the data
        import gguf
        import numpy as np

        writer = gguf.GGUFWriter(part, architecture)
        try:
            for key, value in fields.items():
                _add_field(writer, key, value)
            for entry in entries:
                writer.add_tensor_info(
                    entry.name,
                    entry.shape,
                    np.dtype(np.float32),  # unused beside raw_dtype
                    data_size(entry),
                    raw_dtype=_ggml_type(entry.dtype),
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        num_bytes = part.stat().st_size
        with part.open("ab") as part_file:
            part_file.write(bytes(_padded_size(num_bytes) - num_bytes))
        num_header = _padded_size(num_bytes)
        num_bytes = num_header + sum(_padded_size(data_size(entry)) for entry in entries)
        require_free_space(part.parent, num_bytes - num_header, what=f"{num_bytes:,} bytes of GGUF", fix=_ROOM_HINT)
        with part.open("ab") as file:
            for count, entry in enumerate(entries, 1):
                interrupt.stop_if_requested("interrupted while writing GGUF; nothing is left of it")
                # block by block of rows: no fp32 copy of a large tensor is held
                tensor = entry.load()
                assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)} for {entry.shape}"
                if tensor.ndim == 1:
                    tensor = tensor.unsqueeze(0)
                rows = max(1, _BLOCK_BYTES // (4 * tensor[0].numel()))
                for block in tensor.split(rows):
                    numbers = np.ascontiguousarray(block.float().numpy())
                    with np.errstate(over="ignore"):  # looked at below
                        data = gguf.quants.quantize(numbers, _ggml_type(entry.dtype))
                    stored_values = data if entry.dtype in {"f32", "f16"} else numbers
                    if not np.isfinite(stored_values).all():
                        got = "NaN or infinity" if not np.isfinite(numbers).all() else "a number beyond f16's 65504"
                        fix = "train it again" if got.startswith("NaN") else "export as bf16 or f32"
                        raise UserError(Problem(entry.name, got, f"finite numbers as {entry.dtype}", fix))
                    file.write(data.tobytes())
                del tensor, block  # before the next is read
                size_bytes = data_size(entry)
                file.write(bytes(_padded_size(size_bytes) - size_bytes))
                if count == len(entries) or count % 16 == 0:
                    progress(file.tell(), num_bytes)
    except OSError as error:
        if not is_disk_full(error):
            raise
        got = f"a full disk or a limit on file sizes ({error.strerror})"
        raise UserError(Problem(str(part.parent), got, "room for the whole file", _ROOM_HINT)) from error
    return num_bytes


def _padded_size(num_bytes: int, alignment: int = 32) -> int:
    return -(-num_bytes // alignment) * alignment


def _ggml_type(dtype: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[dtype.upper()]


def data_size(entry: GgufTensor) -> int:
    """Return the bytes of a tensor's data, without padding."""
    import gguf

    per_block, block_bytes = gguf.GGML_QUANT_SIZES[_ggml_type(entry.dtype)]
    count = 1
    for size in entry.shape:
        count *= size
    return count // per_block * block_bytes


def _add_field(writer: Any, key: str, value: Any) -> None:
    # bool first: Python's bool is an int
    kinds = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string))
    for kind, add in (*kinds, (list, writer.add_array)):
        if isinstance(value, kind):
            add(key, value)
            return
    raise TypeError(f"{key}: a header holds no {type(value).__name__}")
