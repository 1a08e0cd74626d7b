"""Names of modules: without layer numbers, and as short as they stay unmistakable."""

from __future__ import annotations

from collections.abc import Iterable


def place_of(name: str) -> str:
    """A name without the numbers of layers: 'model.layers.*.mlp.up_proj'."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _endings(name: str) -> list[str]:
    """'q_proj', 'self_attn.q_proj', ... up to the whole name."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def shortest_names(chosen: Iterable[str], all_names: Iterable[str]) -> tuple[str, ...]:
    """The shortest endings that match exactly the `chosen` of `all_names`, each once, in order."""
    wanted = set(chosen)
    reached: dict[str, set[str]] = {}
    for name in all_names:
        for ending in _endings(name):
            reached.setdefault(ending, set()).add(name)
    found: dict[str, None] = {}
    for name in chosen:
        ending = next(e for e in _endings(name) if reached.get(e, {name}) <= wanted)
        found[ending] = None
    return tuple(found)
