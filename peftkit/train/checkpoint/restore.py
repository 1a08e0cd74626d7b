"""From a checkpoint back to the very state in which the training stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from peftkit.errors import PeftkitError
from peftkit.model.adapter.attach import trainable_tensors
from peftkit.rundir import read_json, write_json
from peftkit.train.adalora import restore_scores
from peftkit.train.checkpoint.snapshot import inner, load_tensors, restore_random_states


def load_trained(model: Any, source: Path | Mapping[str, torch.Tensor]) -> None:
    """Copy trained tensors, or a checkpoint's, into the model. Raises PeftkitError where they are others."""
    saved = load_tensors(source, "trained") if isinstance(source, Path) else source
    live = trainable_tensors(model)
    odd = sorted(set(saved) ^ set(live)) or [n for n, t in saved.items() if t.shape != live[n].shape]
    if odd:
        what = source.name if isinstance(source, Path) else "the state"
        raise PeftkitError(f"{what} was written for other trained tensors (for example {', '.join(odd[:3])})")
    with torch.no_grad():
        for name, tensor in saved.items():
            live[name].copy_(tensor)


class AtStart(TrainerCallback):
    """Does something once the Trainer has loaded what it resumes from."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.act()


class Restore(TrainerCallback):
    """Puts a checkpoint's state back: tensors and schedule at the start, random states at the first step.

    The random states come last because the Trainer draws numbers of its own while it skips to the step: at
    the first step, or before the epoch's data loader is made where the checkpoint ended an epoch.
    `accelerator` is the trainer's, once there is one: it holds the loss scale of fp16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = read_json(folder / "state.json")
        self.random_pending = True
        self.accelerator: Any = None
        epoch = read_json(folder / "trainer_state.json")["epoch"]
        self.at_epoch_end = abs(epoch - round(epoch)) < 1e-9

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        load_trained(model, self.folder)
        self._restore_optimizer(model, inner(optimizer))
        budget = self.folder / "budget.safetensors"
        restore_scores(model, load_tensors(self.folder, "budget") if budget.exists() else {})
        _restore_schedule(lr_scheduler, inner(optimizer), self.state["schedule"])
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.state.get("loss_scale"):
            scaler.load_state_dict(self.state["loss_scale"])

    def _restore_optimizer(self, model: Any, optimizer: Any) -> None:
        live = trainable_tensors(model)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) not in held for p in live.values()):
            raise PeftkitError("the optimizer does not hold the tensors that are trained")
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for key, tensor in load_tensors(self.folder, "optimizer").items():
            name, field = key.rsplit("|", 1)
            # a plain Adam keeps its step counts on the CPU, a fused one beside the parameter
            stays = tensor.ndim == 0 and not on_device
            # a copy: what was loaded maps the file, which will be rotated away
            place = "cpu" if stays else live[name].device
            optimizer.state[live[name]][field] = tensor.to(place, copy=True)
        for key, value in self.state["optimizer"].items():
            name, field = key.rsplit("|", 1)
            optimizer.state[live[name]][field] = value

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.at_epoch_end:  # the next epoch's data loader draws from the random state
            self._put_back()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._put_back()

    def _put_back(self) -> None:
        if self.random_pending:
            self.random_pending = False
            restore_random_states(load_tensors(self.folder, "random"), self.state["random"])


def _restore_schedule(scheduler: Any, optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Where the schedule stood, at the plan's own rates: they are smaller after a rollback."""
    rates = list(scheduler.base_lrs)
    scheduler.load_state_dict({**saved, "base_lrs": rates})
    for group, rate, then, last in zip(
        optimizer.param_groups, rates, saved["base_lrs"], saved["_last_lr"], strict=True
    ):
        group["lr"] = last if rate == then else last * (rate / then)


def handover_folder(checkpoint: Path, folder: Path) -> Path:
    """A folder that the Trainer agrees to resume from: its state as JSON, and no weights.

    The Trainer wants a weights file and loads it without asking for completeness: an empty one leaves the
    model alone, whatever the method, and `Restore` puts the trained tensors back by name.
    """
    folder.mkdir(exist_ok=True)
    save_file({}, folder / "model.safetensors")
    write_json(folder / "trainer_state.json", read_json(checkpoint / "trainer_state.json"))
    return folder
