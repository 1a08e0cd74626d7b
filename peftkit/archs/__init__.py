"""Model families as data: how one is recognised, which modules play which role, what shapes they have."""

from peftkit.archs.families import FAMILIES, ROLES
from peftkit.archs.family import Dims, Family, Linear, ModelShape, Module
from peftkit.archs.known import EMBEDDED, KNOWN, Embedded
from peftkit.archs.shape import family_of, shape_from_config

__all__ = [
    "EMBEDDED",
    "FAMILIES",
    "KNOWN",
    "ROLES",
    "Dims",
    "Embedded",
    "Family",
    "Linear",
    "ModelShape",
    "Module",
    "family_of",
    "shape_from_config",
]
