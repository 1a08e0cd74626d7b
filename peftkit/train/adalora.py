"""AdaLoRA's budget: after each optimizer step PEFT scores ranks and masks those of least importance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from peftkit.train.guard import Guard

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class Budget(TrainerCallback):
    """Calls PEFT's allocator between the optimizer step and the clearing of gradients, as it asks for."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.guard.skipped:  # there are no gradients to score by
            return
        model.base_model.update_and_allocate(state.global_step + 1)


def scores(model: Any) -> dict[str, torch.Tensor]:
    """What the allocator remembers, by name; empty for other methods. Part of a checkpoint."""
    allocator = getattr(model.base_model, "rankallocator", None) if hasattr(model, "peft_config") else None
    if allocator is None:
        return {}
    kept = {
        f"{kind}|{name}": tensor.detach().cpu().contiguous()
        for kind in _SCORES
        for name, tensor in getattr(allocator, kind).items()
    }
    pattern = model.peft_config["default"].rank_pattern or {}
    return kept | {
        f"pattern|{name}": torch.tensor(kept_ranks, dtype=torch.bool) for name, kept_ranks in pattern.items()
    }


def restore_scores(model: Any, saved: Mapping[str, torch.Tensor]) -> None:
    """Give the allocator its memory back."""
    if not saved:
        return
    allocator, device = model.base_model.rankallocator, model.device
    config = model.peft_config["default"]
    config.rank_pattern = config.rank_pattern or {}
    for key, tensor in saved.items():
        kind, name = key.split("|", 1)
        if kind == "pattern":
            config.rank_pattern[name] = tensor.tolist()
        else:
            getattr(allocator, kind)[name] = tensor.to(device, copy=True)
