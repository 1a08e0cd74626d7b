"""Checkpoints: a snapshot in memory, written by a thread, restored by name."""
