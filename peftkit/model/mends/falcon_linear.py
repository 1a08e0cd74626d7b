"""Falcon's linear layers are a subclass, so 4-bit loading would leave every one of them as it is.

Fault: transformers replaces a layer by its 4-bit version where `type(module) is nn.Linear`; Falcon builds
`FalconLinear`, a subclass that computes the same. 0 % of the model was quantized, without a word.
Seen in transformers 5.23.0. While a model is loaded inside `mended()`, Falcon builds plain linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def mended() -> Iterator[None]:
    """Falcon's modelling module builds `nn.Linear` inside this block, and what it built before afterwards."""
    from torch import nn
    from transformers.models.falcon import modeling_falcon

    kept = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = kept
