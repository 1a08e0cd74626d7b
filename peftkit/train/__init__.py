"""Training on TRL's trainer through its public API, with our own checkpoints and records."""

from peftkit.train.training import Training, assemble

__all__ = ["Training", "assemble"]
