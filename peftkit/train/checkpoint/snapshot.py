"""The state of a training at one step, held in memory, and the checkpoint written from it.

A checkpoint holds the trained tensors, the optimizer's tensors named by parameter, the random states, the
schedule, the Trainer's state, and our own progress, as safetensors and JSON alone. `.restore` loads it.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from peftkit import ranks
from peftkit.model.adapter.attach import trainable_tensors
from peftkit.model.hardware import device_random_state, restore_device_random_state
from peftkit.rundir import RunDir, publish_folder, verify_folder, write_json
from peftkit.train.adalora import allocator_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUM_KEPT = 2  # besides the best one
_JSON_TYPES = (bool, int, float, str, type(None), list)
SHARD_BYTES = 2**29  # what is serialized at once: a second copy of so many bytes, not of everything

Tensors = dict[str, torch.Tensor]
RandomStates = tuple[Tensors, dict[str, Any]]


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return torch's optimizer from inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """Return the optimizer's state by "parameter|field": (tensors, plain values)."""
    names = {id(parameter): name for name, parameter in trainable_tensors(model).items()}
    tensors, values = {}, {}
    for parameter, state in unwrap_optimizer(optimizer).state.items():
        for key, value in state.items():
            name = f"{names[id(parameter)]}|{key}"
            if torch.is_tensor(value):
                tensors[name] = value
            else:
                values[name] = value
    return tensors, values


_GROUP_COUNTERS = ("k", "weight_sum", "lr_max")  # of schedule-free optimizers: steps and weights of the mean


def group_counters(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Return what an optimizer counts for each group of parameters; nothing for most."""
    groups = unwrap_optimizer(optimizer).param_groups
    return [{name: group[name] for name in _GROUP_COUNTERS if name in group} for group in groups]


def random_states() -> RandomStates:
    """Return the random states of torch, Python and numpy, as (tensors, JSON values)."""
    python, numpy_state = random.getstate(), np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64))}
    if (device_state := device_random_state()) is not None:
        tensors["cuda"] = device_state
    values = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [str(numpy_state[0]), int(numpy_state[2]), int(numpy_state[3]), float(numpy_state[4])],
    }
    return tensors, values


def restore_random_states(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Restore the random states that `random_states` returned."""
    torch.set_rng_state(tensors["torch"].to(torch.uint8))
    if "cuda" in tensors:
        restore_device_random_state(tensors["cuda"])
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))


@dataclass(frozen=True)
class TrainingSnapshot:
    """The content of a checkpoint. `tensors` maps a file's stem to tensors by name."""

    step: int
    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]
    trainer_state: Mapping[str, Any]
    facts: Mapping[str, Any]  # for the manifest

    @property
    def size_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(_num_bytes(tensors) for tensors in self.tensors.values())

    def copy_to_cpu(self) -> TrainingSnapshot:
        """Return a copy on the CPU, which later steps do not change."""
        copies = {
            stem: {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            for stem, tensors in self.tensors.items()
        }
        return TrainingSnapshot(self.step, copies, self.state, self.trainer_state, self.facts)

    def commit(self, run: RunDir) -> Path:
        """Publish the checkpoint, verified by reading it back. Returns its folder. Raises OSError."""
        folder, hashes = run.checkpoint(self.step), dict[str, str]()
        with publish_folder(folder, known_hashes=hashes, step=self.step, **self.facts) as staging:
            for stem, tensors in self.tensors.items():
                for number, shard in enumerate(_shards(tensors), start=1):
                    name = f"{stem}.safetensors" if number == 1 else f"{stem}-{number}.safetensors"
                    data = save({key: tensor.cpu().contiguous() for key, tensor in shard.items()})
                    hashes[name] = hashlib.sha256(data).hexdigest()
                    (staging / name).write_bytes(data)
            write_json(staging / "state.json", self.state)
            write_json(staging / "trainer_state.json", self.trainer_state)
        return folder


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _shards(tensors: Tensors) -> Iterator[Tensors]:
    """Yield shards of at most `SHARD_BYTES`, or of one larger tensor; at least one shard."""
    piece: Tensors = {}
    for name, tensor in tensors.items():
        if piece and _num_bytes(piece) + _num_bytes({name: tensor}) > SHARD_BYTES:
            yield piece
            piece = {}
        piece[name] = tensor
    yield piece


def load_tensors(folder: Path, stem: str) -> Tensors:
    """Load all tensors of a checkpoint's file from all its shards."""
    tensors = load_file(folder / f"{stem}.safetensors")
    number = 2
    while (piece := folder / f"{stem}-{number}.safetensors").exists():
        tensors |= load_file(piece)
        number += 1
    return tensors


def take_snapshot(
    *,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    state: Any,
    extra_state: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> TrainingSnapshot:
    """Return the training's current state.

    Its tensors are references to those being trained: commit it or `copy_to_cpu` before the next step.
    `extra_state` is our own state, stored as JSON beside the optimizer's and the schedule's.
    """
    tensors, values = optimizer_state(model, optimizer)
    random_tensors, random_values = random_states()
    # of the other ranks, too: each goes on with its own
    states = ranks.gathered([{name: tensor.tolist() for name, tensor in random_tensors.items()}, random_values])
    for rank, (of_rank, _) in enumerate(states[1:], start=1):
        random_tensors |= {
            f"{name}@{rank}": torch.tensor(numbers, dtype=random_tensors[name].dtype)
            for name, numbers in of_rank.items()
        }
    parts = {"trained": trainable_tensors(model), "optimizer": tensors, "random": random_tensors}
    budget = allocator_state(model)
    if budget:
        parts["budget"] = budget
    schedule_values = {key: value for key, value in scheduler.state_dict().items() if isinstance(value, _JSON_TYPES)}
    return TrainingSnapshot(
        step=int(state.global_step),
        tensors={stem: {name: tensor.detach() for name, tensor in part.items()} for stem, part in parts.items()},
        state={
            "optimizer": values,
            "groups": group_counters(optimizer),
            "random": random_values,
            "random_of_ranks": [of_rank for _, of_rank in states[1:]],
            "schedule": schedule_values,
            **extra_state,
        },
        trainer_state=asdict(state),
        facts=facts,
    )


def rotate_checkpoints(run: RunDir, best_step: int | None) -> None:
    """Remove older checkpoints, by step, except the newest two complete ones and the best.

    Where fewer than two are complete, nothing is removed.
    """
    steps = run.checkpoint_steps()
    complete_steps = [step for step in steps if not verify_folder(run.checkpoint(step), hashes=False)]
    if len(complete_steps) < _NUM_KEPT:
        return
    for step in steps:
        if step < complete_steps[-_NUM_KEPT] and step != best_step:
            removal_path = run.checkpoints / f".tmp-old-{run.checkpoint(step).name}"
            run.checkpoint(step).rename(removal_path)  # a kill while files go must not leave half of a checkpoint
            shutil.rmtree(removal_path)
