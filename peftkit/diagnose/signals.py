"""Gradient signals as values: energy by module, and agreement of training and held-out rows.

For a linear layer with dL/dW = G, and two disjoint batches, <G1, G2> is the energy of what both want: noise
cancels in it, as it does not in |G|^2. P(G) is what the adapter's tangent space can express, R(G) the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLLAPSED_REACH = 3e-4


@dataclass(frozen=True)
class ModuleSignal:
    """Gradient energies <G1, G2> of one linear layer; a layer without an adapter has no tangent part."""

    name: str
    role: str
    is_adapted: bool
    num_parameters_per_rank: int  # d_in + d_out
    tangent: float  # <P G1, P G2>
    residual: float  # <R G1, R G2>; of all of G where nothing is adapted
    held_out_residual: float  # <R G_train, R G_held_out>
    agreement: float  # cosine of G1 and G2, noise and all
    size: float = 1.0  # |G1| |G2|
    narrowest: int = 2**31  # the smaller of d_in and d_out


@dataclass(frozen=True)
class Signals:
    """The signals of the layers, and those of the run as a whole."""

    modules: tuple[ModuleSignal, ...]
    head_size: float = 0.0  # |G1| |G2| of the output head
    num_rows: int = 0

    @property
    def tangent(self) -> float:
        return max(0.0, sum(m.tangent for m in self.modules if m.is_adapted))

    @property
    def residual(self) -> float:
        return max(0.0, sum(m.residual for m in self.modules if m.is_adapted))

    @property
    def unadapted(self) -> float:
        return max(0.0, sum(m.residual for m in self.modules if not m.is_adapted))

    @property
    def share_unadapted(self) -> float:
        """Share of the energy that lies in layers without an adapter."""
        total = self.tangent + self.residual + self.unadapted
        return self.unadapted / total if total > 0 else 0.0

    @property
    def share_expressible(self) -> float:
        """Share of the energy that the adapter's tangent space can express."""
        total = self.tangent + self.residual + self.unadapted
        return self.tangent / total if total > 0 else 1.0

    @property
    def generalises(self) -> float:
        """Share of the residual that helps held-out rows too: 1 for all of it, 0 for none."""
        total_residual = sum(m.residual for m in self.modules)
        return sum(m.held_out_residual for m in self.modules) / total_residual if total_residual > 0 else 0.0

    @property
    def reach(self) -> float:
        """Size of all layers' gradients relative to the head's."""
        return sum(m.size for m in self.modules) / self.head_size if self.head_size > 0 else 1.0

    @property
    def is_collapsed(self) -> bool:
        """True if no layer changes the loss any more.

        Runs whose rate was ten times too high had a reach of 9e-7 to 3e-5, others 4e-3 to 5
        (benchmarks/diagnosis/suite.py).
        """
        return bool(self.modules) and self.reach < COLLAPSED_REACH

    @property
    def agreement(self) -> float:
        """Mean cosine of two batches' gradients: near 0 if what is left to learn is noise."""
        return sum(m.agreement for m in self.modules) / len(self.modules) if self.modules else 0.0

    def shares(self) -> dict[str, float]:
        """Return the shares of the unadapted layers' energy by role."""
        energy_by_role: dict[str, float] = {}
        for module in self.modules:
            if not module.is_adapted:
                energy_by_role[module.role] = energy_by_role.get(module.role, 0.0) + module.residual
        total = sum(energy_by_role.values())
        return {role: energy / total if total > 0 else 0.0 for role, energy in energy_by_role.items()}

    def by_worth(self) -> list[tuple[str, float]]:
        """Return (role, energy per added parameter) of the roles without an adapter, best first."""
        return worth([m for m in self.modules if not m.is_adapted])


def worth(modules: Sequence[ModuleSignal]) -> list[tuple[str, float]]:
    """Return (role, energy per parameter of an adapter of rank 1), best first."""
    energy: dict[str, float] = {}
    size: dict[str, int] = {}
    for module in modules:
        energy[module.role] = energy.get(module.role, 0.0) + module.residual
        size[module.role] = size.get(module.role, 0) + module.num_parameters_per_rank
    return sorted(((role, energy[role] / size[role]) for role in energy), key=lambda pair: -pair[1])
