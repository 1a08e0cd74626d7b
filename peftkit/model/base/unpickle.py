"""Pickled weights into safetensors: a program of its own, which `convert.py` starts and watches.

It is the only file that reads such weights, and it trusts nothing: torch's restricted reader takes tensors
alone; memory is capped; and once it reads, this process may start no program, open no socket, and write,
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
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_ROOM_BYTES = 2**30  # of address space, beside what the file itself may take
_MAX_CODE_BYTES = 2**26  # of the part of a zip that says how its tensors are put together
_FORBIDDEN = (
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
_ALLOWED = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class _Refused(Exception):
    """Why a file is not converted, in words."""


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: what weights never need ends the reading. It cannot be taken off again."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(flags, int) and flags & _WRITES
        ):
            raise _Refused(f"it tries to write {arguments[0]!r}")
    elif event.startswith(_FORBIDDEN) and event not in _ALLOWED:
        raise _Refused(f"it tries {event}")


def _cap_memory(num_bytes: int) -> None:
    """At most so many bytes of address space beyond what this process takes now, where Linux tells that."""
    if sys.platform != "linux":
        return
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  nothing but the system is asked
        now = int(file.read().split()[0]) * resource.getpagesize()
    limit = now + num_bytes + _ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _check_zip(path: str) -> None:
    """Entries stand in the file as they are: torch compresses nothing, so that nothing can expand."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise _Refused(f"a damaged zip ({error})") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _Refused("a zip with compressed entries, which torch never writes")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):  # noqa: PTH202
        raise _Refused("a zip whose entries claim more bytes than it has")
    if any(entry.file_size > _MAX_CODE_BYTES for entry in entries if entry.filename.endswith(".pkl")):
        raise _Refused("a zip that says too much about its tensors")


def _tensors(found: Any) -> dict[str, torch.Tensor]:
    """What was read, if it is a flat dict of ordinary tensors."""
    if not isinstance(found, dict):
        raise _Refused(f"{type(found).__name__}, expected a flat dict of tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _Refused(f"{name!r} is {type(value).__name__}, expected a flat dict of tensors")
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise _Refused(f"{name!r} is no plain tensor ({value.layout}, {value.device})")
    return {name: value.detach() for name, value in found.items()}


def _alone(tensors: dict[str, torch.Tensor], max_bytes: int) -> dict[str, torch.Tensor]:
    """Every tensor with bytes of its own: tied ones are written once each, as safetensors asks."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if num_bytes > max_bytes:
        raise _Refused(f"tensors that expand to {num_bytes:,} bytes, more than the {max_bytes:,} allowed")
    seen: set[int] = set()
    made = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and tensor.numel() * tensor.element_size() == storage.nbytes()
        made[name] = tensor if whole and storage.data_ptr() not in seen else tensor.contiguous().clone()
        seen.add(storage.data_ptr())
    return made


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same bytes: NaN is equal to itself here."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def convert_one(source: str, target: str, max_bytes: int) -> dict[str, Any]:
    """Read one file, write it as safetensors, and compare what was written. Returns names and sizes."""
    with open(source, "rb") as file:  # noqa: PTH123
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        _check_zip(source)
    # legacy files cannot be mapped: they are read whole, within the memory allowed
    tensors = _alone(
        _tensors(torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)), max_bytes
    )
    save_file(tensors, target, metadata={"format": "pt"})
    with safe_open(target, framework="pt") as written:
        wrong = [name for name, tensor in tensors.items() if not _equal(written.get_tensor(name), tensor)]
    if wrong:
        raise _Refused(f"{wrong[0]!r} was not written as it was read")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    return {"source": source, "target": target, "sizes": sizes}


def _fault(error: BaseException) -> str:
    """An error in words. torch's own go on to advise the reader that runs code: that part is left out."""
    text = str(error).strip()
    if isinstance(error, MemoryError):
        return "more memory asked for than its size allows"
    if isinstance(error, UnpicklingError):
        found = re.search(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)", text)
        return f"code or objects in it ({found[1]})" if found else "code or objects in it"
    return text.splitlines()[0] if text else type(error).__name__


def main() -> int:
    """Convert what stdin names, one file after the other; stop at the first that cannot be."""
    jobs = json.load(sys.stdin)
    made: list[dict[str, Any]] = []
    _cap_memory(3 * max((max_bytes for _, _, max_bytes in jobs), default=0))
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    sys.addaudithook(_guard)
    for source, target, max_bytes in jobs:
        try:
            made.append(convert_one(source, target, max_bytes))
        except BaseException as error:  # noqa: BLE001  a hostile file may make anything of it: told, never run
            print(json.dumps({"fault": _fault(error)[:300], "source": source}))
            return 1
    print(json.dumps({"made": made}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
