"""Checkpoints of our own: safetensors and JSON, complete or absent, enough to go on exactly.

A checkpoint holds the trained tensors, the optimizer's tensors named by parameter, the random states, the
schedule, the Trainer's state, and our own progress (best loss, patience). The way back in is `Restore`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from peftkit.errors import PeftkitError
from peftkit.model.adapter import trainable_tensors
from peftkit.rundir import RunDir, publish_folder, read_json, write_json
from peftkit.train.budget import restore_scores, scores

_KEPT = 2  # besides the best one
_PLAIN = (bool, int, float, str, type(None), list)


def _inner(optimizer: Any) -> Any:
    """torch's optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _optimizer_tensors(model: Any, optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State per parameter name: tensors, and plain values."""
    names = {id(parameter): name for name, parameter in trainable_tensors(model).items()}
    tensors, values = {}, {}
    for parameter, state in _inner(optimizer).state.items():
        for key, value in state.items():
            name = f"{names[id(parameter)]}|{key}"
            if torch.is_tensor(value):
                tensors[name] = value.detach().cpu().contiguous()
            else:
                values[name] = value
    return tensors, values


RandomStates = tuple[dict[str, torch.Tensor], dict[str, Any]]


def random_states() -> RandomStates:
    """The random states of torch, Python and numpy, as tensors and JSON values."""
    python, numpy_state = random.getstate(), np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    values = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [str(numpy_state[0]), int(numpy_state[2]), int(numpy_state[3]), float(numpy_state[4])],
    }
    return tensors, values


def restore_random_states(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Put back what `random_states` took."""
    torch.set_rng_state(tensors["torch"].to(torch.uint8))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].to(torch.uint8))
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))


def write_checkpoint(
    run: RunDir,
    *,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    state: Any,
    progress: Mapping[str, Any],
) -> Path:
    """Publish the checkpoint of `state.global_step`. Returns its folder."""
    folder = run.checkpoint(state.global_step)
    with publish_folder(folder, step=state.global_step) as staging:
        trained = {name: p.detach().cpu().contiguous() for name, p in trainable_tensors(model).items()}
        save_file(trained, staging / "trained.safetensors")
        tensors, values = _optimizer_tensors(model, optimizer)
        save_file(tensors, staging / "optimizer.safetensors")
        budget = scores(model)
        if budget:
            save_file(budget, staging / "budget.safetensors")
        random_tensors, random_values = random_states()
        save_file(random_tensors, staging / "random.safetensors")
        plain = {key: value for key, value in scheduler.state_dict().items() if isinstance(value, _PLAIN)}
        write_json(
            staging / "state.json",
            {"optimizer": values, "random": random_values, "schedule": plain, "progress": dict(progress)},
        )
        state.save_to_json(str(staging / "trainer_state.json"))
    return folder


def rotate(run: RunDir, best_step: int | None) -> None:
    """Remove older checkpoints, by step, keeping the newest two and the best."""
    for step in run.checkpoint_steps()[:-_KEPT]:
        if step != best_step:
            shutil.rmtree(run.checkpoint(step))


def load_trained(model: Any, folder: Path) -> None:
    """Copy a checkpoint's trained tensors into the model. Raises PeftkitError where the names differ."""
    saved, live = load_file(folder / "trained.safetensors"), trainable_tensors(model)
    if set(saved) != set(live):
        odd = sorted(set(saved) ^ set(live))[:3]
        raise PeftkitError(
            f"{folder.name} was written for other trained tensors (for example {', '.join(odd)})"
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            live[name].copy_(tensor)


class Restore(TrainerCallback):
    """Puts a checkpoint's state back: tensors and schedule at the start, random states at the first step.

    The random states come last because the Trainer draws numbers of its own while it skips to the step: at
    the first step, or before the epoch's data loader is made where the checkpoint ended an epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = read_json(folder / "state.json")
        self.random_pending = True
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
        live, inner = trainable_tensors(model), _inner(optimizer)
        held = {id(p) for group in inner.param_groups for p in group["params"]}
        if any(id(p) not in held for p in live.values()):
            raise PeftkitError("the optimizer does not hold the tensors that are trained")
        on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
        for key, tensor in load_file(self.folder / "optimizer.safetensors").items():
            name, field = key.rsplit("|", 1)
            # a plain Adam keeps its step counts on the CPU, a fused one beside the parameter
            stays = tensor.ndim == 0 and not on_device
            inner.state[live[name]][field] = tensor if stays else tensor.to(live[name].device)
        for key, value in self.state["optimizer"].items():
            name, field = key.rsplit("|", 1)
            inner.state[live[name]][field] = value
        budget = self.folder / "budget.safetensors"
        restore_scores(model, load_file(budget) if budget.exists() else {})
        lr_scheduler.load_state_dict(self.state["schedule"])
        for group, rate in zip(inner.param_groups, self.state["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.at_epoch_end:  # the next epoch's data loader draws from the random state
            self._put_back()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._put_back()

    def _put_back(self) -> None:
        if self.random_pending:
            self.random_pending = False
            restore_random_states(load_file(self.folder / "random.safetensors"), self.state["random"])


def handover_folder(checkpoint: Path, folder: Path) -> Path:
    """A folder that the Trainer agrees to resume from: its state as JSON, and no weights.

    The Trainer wants a weights file and loads it without asking for completeness: an empty one leaves the
    model alone, whatever the method, and `Restore` puts the trained tensors back by name.
    """
    folder.mkdir(exist_ok=True)
    save_file({}, folder / "model.safetensors")
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    write_json(folder / "trainer_state.json", state)
    return folder
