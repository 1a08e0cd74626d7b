"""Concatenation of several LoRA adapters into one: exact at the summed rank, or the best at a smaller rank.

sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]: nothing is lost. A truncated singular
value decomposition of that is the nearest matrix of its rank (Eckart and Young 1936).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peftkit import interrupt
from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.model.adapter.edits import Edit, Edits
from peftkit.model.base.identity import IDENTITY_FILE, base_identity
from peftkit.rundir import publish_folder, write_sealed
from peftkit.rundir.disk import explain_disk_errors, resolve_new_folder
from peftkit.ship.files.folder import TOKENIZER_FILES
from peftkit.ship.files.tensors import TensorEntry
from peftkit.ship.merge.decide import MergeOptions, read_adapter_set
from peftkit.ship.merge.plain_lora import LoraPair, write_plain_lora
from peftkit.units import html_table

AdapterSource = tuple[Edits, Mapping[str, TensorEntry]]
_SUM_TOLERANCE = 1e-5  # of a change's length: rounding in fp32


@dataclass(frozen=True)
class ConcatenatedLora:
    """The concatenated adapter: its rank, and the share of the changes' energy (squared norm) left out."""

    rank: int
    full_rank: int
    discarded: float
    most_discarded: float  # of one weight

    @property
    def said(self) -> str:
        """Return the rank and the discarded energy in words."""
        if self.rank >= self.full_rank:
            return f"rank {self.rank}: the sum, exactly"
        text = f"{self.discarded:.2%} of the energy is left out, up to {self.most_discarded:.2%} per weight"
        return f"rank {self.rank} of {self.full_rank}: {text}"


def write_concatenated(
    sources: Sequence[AdapterSource],
    weights: Sequence[float],
    config: Mapping[str, object],
    out: Path,
    *,
    rank: int | None,
    parameters: Collection[str],
) -> ConcatenatedLora:
    """Write one plain LoRA into `out`, a folder that exists. `rank` None keeps everything.

    Raises UserError for adapters that are more than LoRA of weights, and PeftkitError where what was written
    is not the sum.
    """
    problems = [
        Problem(
            "--as-adapter",
            f"{edit.kind} of {name}",
            "LoRA of weights only",
            "leave out --as-adapter: merge into dense weights",
        )
        for edits, _ in sources
        for name, weight_edits in edits.items()
        for edit in weight_edits
        if edit.kind != "lora" and not edit.is_table_copy
    ]
    if problems:
        raise UserError(problems[:5])
    parts_by_module: dict[str, list[_LoraPart]] = {}
    for (edits, tensors), weight in zip(sources, weights, strict=True):
        for name, weight_edits in edits.items():
            for edit in weight_edits:
                if edit.kind == "lora":
                    parts = {part: tensors[key].read() for part, key in edit.tensors.items()}
                    parts_by_module.setdefault(name.removesuffix(".weight"), []).append((weight, parts, edit))
    full_rank = max(sum(entry[1]["A"].shape[0] for entry in module_parts) for module_parts in parts_by_module.values())
    target_rank = min(rank or full_rank, full_rank)
    residuals: dict[str, tuple[float, float]] = {}  # by module: what is left out of the sum, and the sum
    part_energies: dict[str, float] = {}  # what the adapters change, one by one: their sum may be nothing

    def pair(module: str) -> LoraPair:
        # A of all, and B of all with weights and scales
        parts = parts_by_module[module]
        a = [f["A"].float() * f.get("E", torch.ones(1, 1)).float() for _, f, _ in parts]
        b = [f["B"].float() * (weight * edit.scale) for weight, f, edit in parts]
        factors, exact_sum = (torch.cat(a), torch.cat(b, dim=1)), _exact_sum(parts)
        if target_rank < factors[0].shape[0]:
            factors = _truncated_svd(factors, target_rank)
        residual = (exact_sum - factors[1].double() @ factors[0].double()).square().sum()
        residuals[module] = float(residual), float(exact_sum.square().sum())
        part_energies[module] = sum(float(_exact_sum([part]).square().sum()) for part in parts)
        return factors

    write_plain_lora(out, config, list(parts_by_module), pair, rank=target_rank, parameters=parameters)
    left, energy = (sum(values) for values in zip(*residuals.values(), strict=True))
    most_discarded = max(
        module_residual / max(module_energy, 1e-30) for module_residual, module_energy in residuals.values()
    )
    error = max(residuals[module][0] / max(part_energies[module], 1e-30) for module in residuals)
    if target_rank == full_rank and not error <= _SUM_TOLERANCE**2:
        raise PeftkitError(f"the concatenation is off the sum by {error**0.5:.1e} of the norm of its parts")
    return ConcatenatedLora(
        target_rank, full_rank, left / max(energy, 1e-30) if target_rank < full_rank else 0.0, most_discarded
    )


_LoraPart = tuple[float, dict[str, torch.Tensor], Edit]  # weight of the adapter, factors, edit


def _exact_sum(parts: Sequence[_LoraPart]) -> torch.Tensor:
    """Compute the sum of the changes, each by itself, in fp64 as (d_out, d_in)."""
    return sum(
        weight
        * edit.scale
        * (factors["B"].double() @ (factors["A"].double() * factors.get("E", torch.ones(1, 1)).double()))
        for weight, factors, edit in parts
    )  # type: ignore[return-value]


def _truncated_svd(pair: LoraPair, rank: int) -> LoraPair:
    """Return the factors of the nearest product of this rank; they share the singular values evenly.

    A^T = Qa Ra, B = Qb Rb               QR of (d_in, full rank) and of (d_out, full rank)
    Rb Ra^T = U S V                      SVD of (full rank, full rank) only
    A' = S^(1/2) V Qa^T  (rank, d_in)    B' = Qb U S^(1/2)  (d_out, rank)
    """
    qa, ra = torch.linalg.qr(pair[0].double().T)
    qb, rb = torch.linalg.qr(pair[1].double())
    u, s, v = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    a = root[:, None] * (v[:rank] @ qa.T)
    return a.float(), (qb @ (u[:, :rank] * root)).float()


@dataclass(frozen=True)
class Combined:
    """Outcome of a combination into one adapter: its folder, the adapters with weights, and its rank."""

    out: str
    adapters: tuple[tuple[str, float], ...]
    made: ConcatenatedLora

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, value) rows for a table."""
        parts = ", ".join(f"{name} x {weight:g}" for name, weight in self.adapters)
        return [("adapters", parts), ("written", self.made.said)]

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def concat_adapters(paths: Sequence[Path], out: Path, options: MergeOptions, *, rank: int | None = None) -> Combined:
    """Write the weighted sum of adapters as one plain LoRA: exact, or the nearest of a smaller `rank`.

    Raises UserError where one is more than LoRA of weights, or of another base.
    """
    if options.combine != "sum":
        got, fix = f"{options.combine} with --as-adapter", "leave out --as-adapter, or --combine"
        raise UserError(Problem("--combine", got, "sum", fix))
    out = resolve_new_folder(out)
    adapter_set = read_adapter_set(paths, options)
    first, weights = adapter_set.adapters[0], adapter_set.how.weights
    with interrupt.catch_signals(), explain_disk_errors(out), publish_folder(out) as staging:
        concatenated = write_concatenated(
            adapter_set.sources, weights, first.config, staging, rank=rank, parameters=adapter_set.parameters
        )
        write_sealed(staging / IDENTITY_FILE, {"base": base_identity(first.source, first.base)})
        for path in sorted({path for pattern in TOKENIZER_FILES for path in first.folder.glob(pattern)}):
            shutil.copyfile(path, staging / path.name)
    weighted_folders = tuple(
        (str(adapter.folder), weight) for adapter, weight in zip(adapter_set.adapters, weights, strict=True)
    )
    return Combined(str(out), weighted_folders, concatenated)
