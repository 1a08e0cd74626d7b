"""Which methods a model can be trained with: the answer, its reason, and the nearest method that works."""

from __future__ import annotations

from peftkit.archs import ModelShape
from peftkit.methods import METHODS, Method


def refusal(method: Method, shape: ModelShape) -> str:
    """Why a method cannot work on a model; empty where it can."""
    known = shape.family.refuses.get(method.name) or method.refuses(shape)
    if known:
        return known
    if method.default_roles is not None and not method.default_roles(shape)[0]:
        return f"none of its layers plays a role that {method.name} adapts"
    return ""


def nearest_method(method: Method, shape: ModelShape) -> str:
    """The method to use instead of one that is refused."""
    seen = {method.name}
    name = method.nearest
    while refusal(METHODS[name], shape) and name not in seen:
        seen.add(name)
        name = METHODS[name].nearest
    return name
