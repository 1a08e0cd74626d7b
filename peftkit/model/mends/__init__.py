"""Patches of library faults without a public workaround: one file each, applied to our own model only.

Each file names the version it was seen in and has a test that fails once the fault is gone.
"""
