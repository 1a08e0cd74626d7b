"""The memory ledger: the real training code on the meta device, every allocation and free written down.

`ledger` follows storages, `kernels` calls what the target device would run instead of what the meta device
would, `caching` replays the record through CUDA's caching allocator, `step` runs one step of a plan.
"""
