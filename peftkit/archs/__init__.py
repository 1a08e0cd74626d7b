"""Model families as data: how one is recognised, the roles of its modules, their shapes."""

from peftkit.archs.families import ATTENTION_ROLES, EXPERT_ROLES, FAMILIES, ROLES
from peftkit.archs.family import (
    TASKS,
    Dims,
    Family,
    Linear,
    ModelShape,
    Module,
    Task,
    Tensor,
    shortest_names,
    wildcard_name,
)
from peftkit.archs.known import EMBEDDED, KNOWN, Embedded
from peftkit.archs.shape import family_of, shape_from_config, shape_of, task_of

__all__ = [
    "ATTENTION_ROLES",
    "EMBEDDED",
    "EXPERT_ROLES",
    "FAMILIES",
    "KNOWN",
    "ROLES",
    "TASKS",
    "Dims",
    "Embedded",
    "Family",
    "Linear",
    "ModelShape",
    "Module",
    "Task",
    "Tensor",
    "family_of",
    "shape_from_config",
    "shape_of",
    "shortest_names",
    "task_of",
    "wildcard_name",
]
