"""Fused kernels of state layers: optional packages, and what their absence costs."""

from __future__ import annotations

import importlib.util

from peftkit.archs import ModelShape


def missing_kernels(shape: ModelShape) -> tuple[str, ...]:
    """Packages that a family is slow without on a GPU, and that are not installed."""
    return tuple(name for name in shape.family.kernels if importlib.util.find_spec(name) is None)


def kernels_text(missing: tuple[str, ...]) -> str:
    """What is lost without them, and how to get them."""
    return (
        f"not installed: {', '.join(missing)}. Its state layers then run in plain torch, slower and with "
        f"more memory (docs/families.md tells how much): pip install {' '.join(missing)}"
    )
