"""What is told as out of memory, and what the host has in use."""

import errno

import pytest
import torch

from peftkit.model.hardware import detect_device_without_torch, is_out_of_memory

SHORT = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: str(error)[:40])
def test_every_form_of_it_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), OSError(errno.ENOSPC, "full")]
)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def test_a_real_one_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_host_is_not_said_to_be_full_of_ourselves():
    device = detect_device_without_torch()
    if device.kind == "cpu":
        assert 0 <= device.used_bytes < device.memory_bytes
