"""Patch: bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16, after which gradients are wrong.

Fault: `Linear4bit.forward` repacks at the first evaluation pass without gradients; the packed product has no
autograd, so later training steps silently get wrong gradients, and merging reads repacked bytes.
Seen in bitsandbytes 0.50.2. No setting turns it off, so the flag is cleared on each layer of our model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLAG = "support_avx512bf16_for_cpu"


def clear_repack_flag(model: PreTrainedModel) -> int:
    """Clear the repacking flag of every 4-bit layer. Returns the number of layers that had it set."""
    cleared = 0
    for module in model.modules():
        if getattr(module, FLAG, False):
            setattr(module, FLAG, False)
            cleared += 1
    return cleared
