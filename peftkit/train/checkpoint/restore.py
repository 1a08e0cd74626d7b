"""Restoring a training to the exact state of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed

from peftkit import ranks
from peftkit.errors import PeftkitError
from peftkit.model.adapter.attach import trainable_tensors
from peftkit.rundir import read_json, write_json
from peftkit.train.adalora import restore_allocator_state
from peftkit.train.checkpoint.snapshot import load_tensors, restore_random_states, unwrap_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments


def load_trained(model: PreTrainedModel, source: Path | Mapping[str, torch.Tensor]) -> None:
    """Copy trained tensors, or a checkpoint's, into the model. Raises PeftkitError if they do not match."""
    tensors = load_tensors(source, "trained") if isinstance(source, Path) else source
    parameters = trainable_tensors(model)
    mismatches = sorted(set(tensors) ^ set(parameters)) or [
        n for n, t in tensors.items() if t.shape != parameters[n].shape
    ]
    if mismatches:
        source_name = source.name if isinstance(source, Path) else "the state"
        raise PeftkitError(
            f"{source_name} was written for other trained tensors (for example {', '.join(mismatches[:3])})"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


class TrainBeginCallback(TrainerCallback):
    """A callback that runs an action once the Trainer has loaded the state it resumes from."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.act = action

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.act()


class CheckpointRestorer(TrainerCallback):
    """A callback that restores a checkpoint: tensors and schedule first, random states at the first step.

    The random states come last because the Trainer draws random numbers while it skips to the step.
    `accelerator` is the trainer's, once there is one: it holds the loss scale of fp16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = read_json(folder / "state.json")
        self.random_pending = True
        self.accelerator: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: object,
    ) -> None:
        load_trained(model, self.folder)
        optimizer = unwrap_optimizer(optimizer)
        parameters = trainable_tensors(model)
        parameter_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in parameter_ids for p in parameters.values()):
            raise PeftkitError("the optimizer does not hold the tensors that are trained")
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for key, tensor in load_tensors(self.folder, "optimizer").items():
            name, field = key.rsplit("|", 1)
            # a plain Adam keeps its step counts on the CPU, a fused one beside the parameter
            on_cpu = tensor.ndim == 0 and not on_device
            # a copy: what was loaded maps the file, which will be rotated away
            place = "cpu" if on_cpu else parameters[name].device
            optimizer.state[parameters[name]][field] = tensor.to(place, copy=True)
        for key, value in self.state["optimizer"].items():
            name, field = key.rsplit("|", 1)
            optimizer.state[parameters[name]][field] = value
        for group, counters in zip(optimizer.param_groups, self.state.get("groups", []), strict=False):
            group.update(counters)
        budget = self.folder / "budget.safetensors"
        restore_allocator_state(model, load_tensors(self.folder, "budget") if budget.exists() else {})
        # the schedule goes on at the plan's own learning rates, which a recovery may have lowered
        saved_state = self.state["schedule"]
        rates = list(lr_scheduler.base_lrs)
        lr_scheduler.load_state_dict({**saved_state, "base_lrs": rates})
        for group, rate, saved_rate, last_rate in zip(
            optimizer.param_groups, rates, saved_state["base_lrs"], saved_state["_last_lr"], strict=True
        ):
            group["lr"] = last_rate if rate == saved_rate else last_rate * (rate / saved_rate)
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.state.get("loss_scale"):
            scaler.load_state_dict(self.state["loss_scale"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.random_pending:
            self.random_pending = False
            place, values = ranks.current(), [self.state["random"], *self.state.get("random_of_ranks", [])]
            tensors = load_tensors(self.folder, "random")
            if place.rank and len(values) == place.num:
                suffix = f"@{place.rank}"
                tensors = {name.removesuffix(suffix): t for name, t in tensors.items() if name.endswith(suffix)}
            if not place.rank or len(values) == place.num:
                restore_random_states(tensors, values[place.rank])
            else:  # another number of ranks: the lead goes on with its own, the rest begin anew
                set_seed(rank_seed(args.seed, place.rank, step=state.global_step))


def rank_seed(seed: int, rank: int, *, step: int = 0) -> int:
    """Return the seed of a rank's own random numbers, such as its dropout; the plan's own for the lead at the start."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]) if rank or step else seed


def write_resume_folder(checkpoint: Path, folder: Path) -> Path:
    """Write a folder that the Trainer agrees to resume from: its state as JSON, and no weights.

    The Trainer requires a weights file but accepts an incomplete one: an empty one leaves the model alone,
    whatever the method, and `CheckpointRestorer` loads the trained tensors by name. Returns `folder`.
    """
    folder.mkdir(exist_ok=True)
    save_file({}, folder / "model.safetensors")
    write_json(folder / "trainer_state.json", read_json(checkpoint / "trainer_state.json"))
    return folder
