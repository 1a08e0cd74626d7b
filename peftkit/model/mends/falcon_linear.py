"""Patch: 4-bit loading skips Falcon's linear layers, because they are a subclass of nn.Linear.

Fault: transformers replaces a layer by its 4-bit version where `type(module) is nn.Linear`; Falcon builds
`FalconLinear`, a subclass that computes the same. 0 % of the model was quantized, without a warning.
Seen in transformers 5.23.0. Inside `plain_falcon_linear()` Falcon builds plain linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plain_falcon_linear() -> Iterator[None]:
    """Make Falcon's modelling module build `nn.Linear` inside this block, and restore it afterwards."""
    from torch import nn
    from transformers.models.falcon import modeling_falcon

    original = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = original
