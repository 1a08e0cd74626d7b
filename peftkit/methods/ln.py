"""LN tuning: only the norms are trained (Zhao et al. 2024)."""

from __future__ import annotations

from typing import Literal

from peftkit.archs import ModelShape, shortest_names
from peftkit.methods.base import Method, Options, PeftSpec, RunSize, Selection, count_head, head_arguments


class LnOptions(Options):
    """Every norm of the model, and nothing else."""

    name: Literal["ln"]


def norm_names(shape: ModelShape) -> list[str]:
    """Return endings that match the norms and nothing else."""
    norms = [tensor.name for tensor in shape.tensors if tensor.role == "norms"]
    others = [tensor.name for tensor in shape.tensors] + [module.name for module in shape.modules]
    return list(shortest_names(norms, others))


def count(options: LnOptions, shape: ModelShape, selection: Selection) -> dict[str, int]:
    """Count all parameters of the norms."""
    norms = sum(tensor.num_parameters for tensor in shape.tensors if tensor.role == "norms")
    return {"norms": norms, **count_head(shape)}


def peft(options: LnOptions, shape: ModelShape, selection: Selection) -> PeftSpec:
    """Build peft.LNTuningConfig."""
    names = norm_names(shape)
    return PeftSpec("LNTuningConfig", {"target_modules": names, **head_arguments(shape)})


def learning_rate(options: LnOptions, shape: ModelShape, size: RunSize) -> tuple[float, str]:
    return 1e-3, "norms are few and tolerate large steps: a rule of thumb, not measured at scale"


METHOD = Method(
    name="ln", summary="train the norms only", options=LnOptions, count=count, peft=peft, learning_rate=learning_rate
)
