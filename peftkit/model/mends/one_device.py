"""transformers' Trainer spreads a single process over all GPUs that it sees, by torch's DataParallel.

That trains another batch than was planned, and has no public switch but the environment, which is too late once CUDA is
in use. `n_gpu` of our own arguments is set to one. Seen in transformers 5.23 (TrainingArguments._setup_devices).
"""

from __future__ import annotations

from typing import Any


def use_one_device(arguments: Any) -> None:
    """Let a trainer with these arguments use the process's own device alone."""
    arguments._n_gpu = min(1, arguments.n_gpu)
