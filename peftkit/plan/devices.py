"""GPUs by name, as data: devices that a plan can be made for without having one.

Memory and dense 16-bit throughput (with fp32 accumulation, no sparsity) are from the vendors' data sheets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.plan.facts import DeviceFacts
from peftkit.units import shorten

_GIB = 2**30
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)(tib|tb|gib|gb|g|mib|mb)?$")
_UNITS = {"tib": 2**40, "tb": 10**12, "gib": 2**30, "g": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6}
_MAX_GIB = 1024  # a larger bare number is the name of a GPU without its series


@dataclass(frozen=True)
class Gpu:
    """One model of GPU. `teraflops` is dense bf16 TFLOP/s (fp16 if it has no bf16)."""

    title: str
    memory_gib: float  # as the driver reports it, a little below the number on the box
    teraflops: float
    has_bf16: bool = True


GPUS: dict[str, Gpu] = {
    "b200": Gpu("NVIDIA B200", 179.0, 2250),
    "h200": Gpu("NVIDIA H200", 140.4, 989),
    "h100-80gb": Gpu("NVIDIA H100 80GB HBM3", 79.6, 989),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 79.6, 756),
    "gh200": Gpu("NVIDIA GH200 480GB", 95.5, 989),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 79.2, 312),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 39.4, 312),
    "l40s": Gpu("NVIDIA L40S", 44.5, 362),
    "l40": Gpu("NVIDIA L40", 44.5, 181),
    "l4": Gpu("NVIDIA L4", 22.0, 121),
    "a10g": Gpu("NVIDIA A10G", 22.0, 70),
    "a10": Gpu("NVIDIA A10", 22.0, 125),
    "a40": Gpu("NVIDIA A40", 44.5, 150),
    "a6000": Gpu("NVIDIA RTX A6000", 47.5, 155),
    "rtx6000-ada": Gpu("NVIDIA RTX 6000 Ada Generation", 47.5, 364),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 31.4, 209),
    "rtx5080": Gpu("NVIDIA GeForce RTX 5080", 15.5, 113),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 23.5, 165),
    "rtx4080": Gpu("NVIDIA GeForce RTX 4080", 15.6, 97),
    "rtx4070-ti": Gpu("NVIDIA GeForce RTX 4070 Ti", 11.6, 80),
    "rtx4060-ti-16gb": Gpu("NVIDIA GeForce RTX 4060 Ti", 15.6, 44),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 23.6, 71),
    "rtx3080": Gpu("NVIDIA GeForce RTX 3080", 9.6, 60),
    "rtx3060-12gb": Gpu("NVIDIA GeForce RTX 3060", 11.6, 26),
    "v100-32gb": Gpu("Tesla V100-SXM2-32GB", 31.7, 125, has_bf16=False),
    "v100-16gb": Gpu("Tesla V100-SXM2-16GB", 15.7, 125, has_bf16=False),
    "t4": Gpu("Tesla T4", 14.6, 65, has_bf16=False),
}


def parse_device(text: str, this_device: DeviceFacts, *, where: str = "--gpu") -> tuple[DeviceFacts, str]:
    """Return (device, assumption) for a GPU's name, a size, or `this`.

    Raises UserError with the nearest names. A size is a GPU of that memory with bf16; a bare number means
    GiB.
    """
    lookup_name = text.strip().lower().replace("_", "-").replace(" ", "-")
    compact_name = lookup_name.replace("-", "")
    if lookup_name == "this":
        return this_device, ""
    gpus_by_name = {gpu_name.replace("-", ""): gpu for gpu_name, gpu in GPUS.items()}
    gpus_by_name |= {gpu.title.lower().replace(" ", "").replace("-", ""): gpu for gpu in GPUS.values()}
    gpu = gpus_by_name.get(compact_name)
    if gpu is not None:
        memory = int(gpu.memory_gib * _GIB)
        device = DeviceFacts("cuda", gpu.title, memory, gpu.has_bf16, has_bitsandbytes=True)
        return device, "bitsandbytes is assumed to be installed there"
    size = _SIZE.match(compact_name) if not lookup_name.startswith("-") else None
    num_bytes = float(size[1]) * _UNITS[size[2] or "gib"] if size else 0.0
    if size and 1 <= num_bytes <= _MAX_GIB * 2**30:
        memory = int(num_bytes)
        device = DeviceFacts("cuda", f"a GPU of {text.strip()}", memory, True, has_bitsandbytes=True)
        assumption = "a GPU with bf16 and bitsandbytes is assumed"
        if size[2] is None:
            device = replace(device, name=f"a GPU of {size[1]} GiB")
            assumption = f"{text} is read as {size[1]} GiB (write 24GiB or 24GB to say which); {assumption}"
        return device, assumption
    candidates = [gpu_name for gpu_name in GPUS if compact_name and compact_name in gpu_name.replace("-", "")]
    fix = f"did you mean {' or '.join(candidates)}?" if candidates else did_you_mean(lookup_name, list(GPUS))
    raise UserError(Problem(where, repr(shorten(text)), "a GPU's name, a size such as 24GiB, or this", fix))


def teraflops_of(name: str) -> float | None:
    """Return the dense 16-bit TFLOP/s of a GPU by its driver's name; None if it is unknown."""
    matches = [gpu for gpu in GPUS.values() if gpu.title.lower() in name.lower()]
    return max(matches, key=lambda gpu: len(gpu.title)).teraflops if matches else None
