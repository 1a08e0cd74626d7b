"""Faults of the libraries that have no public way round: one file each, on our own model instance only.

Each file names the version it was seen in and has a test that fails once the fault is gone.
"""
