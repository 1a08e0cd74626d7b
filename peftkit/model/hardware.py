"""Detection of the device, and its memory use."""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from peftkit.plan import DeviceFacts
from peftkit.plan.memory import CONTEXT_BYTES

if TYPE_CHECKING:
    import torch

_FAST_BF16_CAPABILITY = 8.0  # Ampere and later compute bf16 in their tensor cores


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _detect_cpu() -> DeviceFacts:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    has_bf16 = bool({"avx512_bf16", "amx_bf16"} & set(fields.get("flags", "").split()))
    memory = psutil.virtual_memory()
    used_by_others = max(0, int(memory.total - memory.available - psutil.Process().memory_info().rss))
    return DeviceFacts(
        kind="cpu",
        name=fields.get("model name", "CPU"),
        memory_bytes=memory.total,
        used_bytes=used_by_others,
        supports_bf16=has_bf16,
        has_bitsandbytes=_has_bitsandbytes(),
    )


def detect_device_without_torch() -> DeviceFacts:
    """Detect the device without importing torch, so that plans answer at once."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return replace(_detect_cpu(), kind="mps", name="Apple GPU", supports_bf16=False)
    nvidia_smi, visible_devices = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if nvidia_smi is None or visible_devices in {"", "-1"}:
        gpu = None
    else:
        selection = ["-i", visible_devices.split(",")[0]] if visible_devices else []
        query = [
            nvidia_smi,
            *selection,
            "--query-gpu=name,memory.total,memory.used,compute_cap",
            "--format=csv,noheader,nounits",
        ]
        try:
            result = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
            name, mebibytes, used_mebibytes, capability = (
                part.strip() for part in result.stdout.splitlines()[0].split(",")
            )
            gpu = DeviceFacts(
                kind="cuda",
                name=name,
                memory_bytes=int(mebibytes) * 2**20,
                supports_bf16=float(capability) >= _FAST_BF16_CAPABILITY,
                has_bitsandbytes=_has_bitsandbytes(),
                used_bytes=int(used_mebibytes) * 2**20,
            )
        except (subprocess.SubprocessError, OSError, ValueError, IndexError):
            gpu = None  # torch has the last word, and a difference is reported
    return gpu or _detect_cpu()


def count_gpus() -> int | None:
    """Return the number of NVIDIA GPUs that this process may use, without torch; None where the driver does not say."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in {"", "-1"}])
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return 0
    try:
        result = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return len(result.stdout.splitlines())


def detect_device() -> DeviceFacts:
    """Detect the device that torch will use: of several, this process's own."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        free, total = torch.cuda.mem_get_info()
        return DeviceFacts(
            kind="cuda",
            name=properties.name,
            memory_bytes=properties.total_memory,
            supports_bf16=properties.major >= _FAST_BF16_CAPABILITY,
            has_bitsandbytes=_has_bitsandbytes(),
            used_bytes=max(0, total - free - CONTEXT_BYTES["cuda"]),  # the context is ours
        )
    if torch.backends.mps.is_available():
        return replace(_detect_cpu(), kind="mps", name="Apple GPU", supports_bf16=False)
    return _detect_cpu()


def reset_peak_memory() -> None:
    """Reset the peak of memory use: the GPU's, or on Linux this process's."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # the kernel's own switch: 5 resets the peak of resident memory
            Path("/proc/self/clear_refs").write_text("5")


def synchronize() -> None:
    """Wait until the GPU has done what was queued; nothing to do on a CPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_random_state() -> torch.Tensor | None:
    """Return the random state of the GPU; None on a CPU, whose state is torch's own."""
    import torch

    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def restore_device_random_state(state: torch.Tensor) -> None:
    """Restore the random state of the GPU; without a GPU there is none to restore."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state.to(torch.uint8))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device or the host ran out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch on a CPU, the driver, cuBLAS, Triton and MPS have no class of their own for it
    phrases = ("can't allocate memory", "std::bad_alloc", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


def release_memory() -> None:
    """Return unused memory.

    Torch's cached blocks on a GPU to the driver, glibc's freed pages on Linux to the system.
    """

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(OSError, AttributeError):  # glibc keeps freed pages until asked; musl has no such call
            ctypes.CDLL(None).malloc_trim(0)


def read_memory_use() -> dict[str, int]:
    """Return the bytes in use now and at the peak.

    On a GPU: allocated and reserved by torch's allocator. On a CPU: resident size of this process; its peak
    is the operating system's, since the process's start or the last `reset_peak_memory`.
    """
    import torch

    if torch.cuda.is_available():
        return {
            "allocated_bytes": torch.cuda.memory_allocated(),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return {
        "resident_bytes": psutil.Process().memory_info().rss,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def allocator_peak(profile: Any) -> int:
    """Return the highest running sum of allocations less frees of torch's CPU allocator, in bytes."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return highest
