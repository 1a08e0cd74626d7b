"""AdaLoRA's rank allocation: after each optimizer step PEFT scores ranks and masks the least important."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from peftkit.train.guard import StepGuard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

_SCORE_FIELDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraCallback(TrainerCallback):
    """A callback that runs PEFT's rank allocator between the optimizer step and zeroing the gradients."""

    def __init__(self, guard: StepGuard) -> None:
        self.guard = guard

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: object
    ) -> None:
        if self.guard.skipped:  # there are no gradients to score by
            return
        model.base_model.update_and_allocate(state.global_step + 1)


def allocator_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the rank allocator's state by name, for a checkpoint; empty for other methods."""
    allocator = getattr(model.base_model, "rankallocator", None) if hasattr(model, "peft_config") else None
    if allocator is None:
        return {}
    tensors = {
        f"{kind}|{name}": tensor.detach().cpu().contiguous()
        for kind in _SCORE_FIELDS
        for name, tensor in getattr(allocator, kind).items()
    }
    pattern = model.peft_config["default"].rank_pattern or {}
    return tensors | {
        f"pattern|{name}": torch.tensor(rank_mask, dtype=torch.bool) for name, rank_mask in pattern.items()
    }


def restore_allocator_state(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the rank allocator's state from a checkpoint's tensors."""
    if not tensors:
        return
    allocator, device = model.base_model.rankallocator, model.device
    config = model.peft_config["default"]
    config.rank_pattern = config.rank_pattern or {}
    for key, tensor in tensors.items():
        kind, name = key.split("|", 1)
        if kind == "pattern":
            config.rank_pattern[name] = tensor.tolist()
        else:
            getattr(allocator, kind)[name] = tensor.to(device, copy=True)
