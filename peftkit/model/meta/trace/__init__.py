"""Memory tracing: the real training code on the meta device, with every allocation and free recorded.

`ledger` records storages, `kernels` substitutes the operations of the target device, `caching` replays the
record through CUDA's caching allocator, `step` traces one step of a plan.
"""
