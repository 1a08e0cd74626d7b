"""Conversion of pickled weights to safetensors: a separate program, run by peftkit.model.base.convert.

It is the only file that reads such weights, and it trusts nothing: torch's restricted reader accepts tensors
only; memory is capped; and once it reads, this process may start no program, open no socket, and write,
rename or remove no file. It imports nothing of peftkit, so that it runs from its path alone.

    python -P unpickle.py    with [[source, target, max_bytes], ...] as JSON on stdin; JSON on stdout
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import zipfile
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_SPARE_BYTES = 2**30  # of address space, beside what the file itself may take
_MAX_PICKLE_BYTES = 2**26  # of the part of a zip that says how its tensors are put together
_FORBIDDEN_EVENTS = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pty.",
    "signal.",
    "urllib.",
    "sys._current",
)
_ALLOWED_EVENTS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class _Refused(Exception):
    """The reason why a file is not converted."""


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    """Raise _Refused on events that weights never need: an audit hook, which cannot be removed."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITE_FLAGS):
            raise _Refused(f"it tries to write {arguments[0]!r}")
    elif event.startswith(_FORBIDDEN_EVENTS) and event not in _ALLOWED_EVENTS:
        raise _Refused(f"it tries {event}")


def _equal_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same bytes: here NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def _with_own_storage(tensors: Mapping[str, torch.Tensor], max_bytes: int) -> dict[str, torch.Tensor]:
    """Return every tensor with a storage of its own, as safetensors asks. Raises _Refused beyond `max_bytes`."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if num_bytes > max_bytes:
        raise _Refused(f"tensors that expand to {num_bytes:,} bytes, more than the {max_bytes:,} allowed")
    separate, storages = {}, set[int]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        owns_storage = tensor.is_contiguous() and tensor.numel() * tensor.element_size() == storage.nbytes()
        is_first = storage.data_ptr() not in storages
        separate[name] = tensor.detach() if owns_storage and is_first else tensor.detach().contiguous().clone()
        storages.add(storage.data_ptr())
    return separate


def convert_file(source: str, target: str, max_bytes: int) -> dict[str, Any]:
    """Convert one file to safetensors and compare what was written. Returns names and sizes."""
    with open(source, "rb") as file:  # noqa: PTH123
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        # raise _Refused for compressed or oversized zip entries
        try:
            with zipfile.ZipFile(source) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise _Refused(f"a damaged zip ({error})") from None
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _Refused("a zip with compressed entries, which torch never writes")
        if sum(entry.file_size for entry in entries) > os.path.getsize(source):  # noqa: PTH202
            raise _Refused("a zip whose entries claim more bytes than it has")
        if any(entry.file_size > _MAX_PICKLE_BYTES for entry in entries if entry.filename.endswith(".pkl")):
            raise _Refused("a zip with an oversized pickle")
    # legacy files cannot be mapped: they are read whole, within the memory allowed
    content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(content, dict):
        raise _Refused(f"{type(content).__name__}, expected a flat dict of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _Refused(f"{name!r} is {type(value).__name__}, expected a flat dict of tensors")
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise _Refused(f"{name!r} is no plain tensor ({value.layout}, {value.device})")
    tensors = _with_own_storage(content, max_bytes)
    content = value = None  # the originals of copies
    save_file(tensors, target, metadata={"format": "pt"})
    with safe_open(target, framework="pt") as output:
        mismatched = [name for name, tensor in tensors.items() if not _equal_bytes(output.get_tensor(name), tensor)]
    if mismatched:
        raise _Refused(f"{mismatched[0]!r} reads back differently from what was written")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    return {"source": source, "target": target, "sizes": sizes}


def main() -> int:
    """Convert the files named on stdin, one after the other, up to the first that cannot be."""
    jobs = json.load(sys.stdin)
    results: list[dict[str, Any]] = []
    num_bytes = 3 * max((max_bytes for _, _, max_bytes in jobs), default=0)
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  nothing but the system is asked
            used_bytes = int(file.read().split()[0]) * resource.getpagesize()
        limit = used_bytes + num_bytes + _SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    sys.addaudithook(_audit)
    for source, target, max_bytes in jobs:
        try:
            results.append(convert_file(source, target, max_bytes))
        except BaseException as error:  # noqa: BLE001  a hostile file may make anything of it: told, never run
            text = str(error).strip()
            if isinstance(error, MemoryError):
                fault = "it needs more memory than its size allows"
            elif isinstance(error, UnpicklingError):
                match = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", text)
                fault = f"code or objects in it ({match[1]})" if match else "code or objects in it"
            else:
                # torch's messages go on to advise the reader that runs code
                fault = text.splitlines()[0] if text else type(error).__name__
            print(json.dumps({"fault": fault[:300], "source": source}))
            return 1
    print(json.dumps({"made": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
