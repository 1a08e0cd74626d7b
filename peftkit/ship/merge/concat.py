"""Several LoRA adapters as one: exact, with the ranks added up, or the best of a smaller rank.

sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]: nothing is lost. A truncated singular
value decomposition of that is the nearest matrix of its rank (Eckart and Young 1936).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit import interrupt
from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.model.adapter.edits import Edit, Edits
from peftkit.rundir import publish_folder, write_sealed
from peftkit.rundir.disk import new_folder, problems_told
from peftkit.ship.files.tensors import Entry
from peftkit.ship.merge.decide import MergeOptions, adapters_of
from peftkit.ship.merge.plain_lora import Pair, write_plain
from peftkit.units import html_table

Source = tuple[Edits, Mapping[str, Entry]]
_EXACT = 1e-5  # of a change's length: rounding in fp32


@dataclass(frozen=True)
class Concatenated:
    """The one adapter: its rank, and the share of the changes' energy (squared length) that was left out."""

    rank: int
    full_rank: int
    discarded: float
    most_discarded: float  # of one weight

    @property
    def said(self) -> str:
        """In words."""
        if self.rank >= self.full_rank:
            return f"rank {self.rank}: the sum, exactly"
        lost = f"{self.discarded:.2%} of the energy is left out, {self.most_discarded:.2%} of one weight"
        return f"rank {self.rank} of {self.full_rank}: {lost}"


def concatenate(
    sources: Sequence[Source],
    weights: Sequence[float],
    config: Mapping[str, Any],
    out: Path,
    *,
    rank: int | None,
    parameters: Collection[str],
) -> Concatenated:
    """Write one plain LoRA into `out`, a folder that is there. `rank` None keeps everything.

    Raises UserError for adapters that are more than LoRA of weights, and PeftkitError where what was written
    is not the sum.
    """
    _refuse(sources)
    by_module = _by_module(sources, weights)
    full = max(sum(entry[1]["A"].shape[0] for entry in own) for own in by_module.values())
    size = min(rank or full, full)
    lost: dict[str, tuple[float, float]] = {}  # by module: what is left out of the sum, and the sum
    parts: dict[str, float] = {}  # what the adapters change, one by one: their sum may be nothing

    def pair(module: str) -> Pair:
        made, exact = _stacked(by_module[module]), _summed(by_module[module])
        if size < made[0].shape[0]:
            made = _truncated(made, size)
        left = (exact - made[1].double() @ made[0].double()).square().sum()
        lost[module] = float(left), float(exact.square().sum())
        parts[module] = sum(float(_summed([part]).square().sum()) for part in by_module[module])
        return made

    write_plain(out, config, list(by_module), pair, rank=size, parameters=parameters)
    left, total = (sum(values) for values in zip(*lost.values(), strict=True))
    most = max(one / max(whole, 1e-30) for one, whole in lost.values())
    wrong = max(lost[module][0] / max(parts[module], 1e-30) for module in lost)
    if size == full and not wrong <= _EXACT**2:
        raise PeftkitError(f"the concatenation misses the sum by {wrong**0.5:.1e} of its parts' length")
    return Concatenated(size, full, left / max(total, 1e-30) if size < full else 0.0, most)


_Part = tuple[float, dict[str, torch.Tensor], Edit]  # weight of the adapter, factors, edit


def _refuse(sources: Sequence[Source]) -> None:
    problems = [
        Problem("--as-adapter", f"{edit.kind} of {name}", "LoRA of weights alone", "merge: leave it out")
        for edits, _ in sources
        for name, own in edits.items()
        for edit in own
        if edit.kind != "lora" and not edit.copied
    ]
    if problems:
        raise UserError(problems[:5])


def _by_module(sources: Sequence[Source], weights: Sequence[float]) -> dict[str, list[_Part]]:
    found: dict[str, list[_Part]] = {}
    for (edits, tensors), weight in zip(sources, weights, strict=True):
        for name, own in edits.items():
            for edit in own:
                if edit.kind == "lora":
                    parts = {part: tensors[key].read() for part, key in edit.tensors.items()}
                    found.setdefault(name.removesuffix(".weight"), []).append((weight, parts, edit))
    return found


def _stacked(parts: Sequence[_Part]) -> Pair:
    """A of all, and B of all with weights and scales."""
    a = [factors["A"].float() * factors.get("E", torch.ones(1, 1)).float() for _, factors, _ in parts]
    b = [factors["B"].float() * (weight * edit.scale) for weight, factors, edit in parts]
    return torch.cat(a), torch.cat(b, dim=1)


def _summed(parts: Sequence[_Part]) -> torch.Tensor:
    """The sum of the changes, each worked out by itself, in fp64 as (d_out, d_in)."""
    return sum(
        weight * edit.scale * (f["B"].double() @ (f["A"].double() * f.get("E", torch.ones(1, 1)).double()))
        for weight, f, edit in parts
    )  # type: ignore[return-value]


def _truncated(pair: Pair, rank: int) -> Pair:
    """The nearest product of this rank; the factors share the singular values evenly."""
    qa, ra = torch.linalg.qr(pair[0].double().T)
    qb, rb = torch.linalg.qr(pair[1].double())
    u, s, v = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    a = root[:, None] * (v[:rank] @ qa.T)
    return a.float(), (qb @ (u[:, :rank] * root)).float()


@dataclass(frozen=True)
class Combined:
    """The folder of the one adapter, what it was made of, and what was left out of it."""

    out: str
    adapters: tuple[tuple[str, float], ...]
    made: Concatenated

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        parts = ", ".join(f"{name} x {weight:g}" for name, weight in self.adapters)
        return [("adapters", parts), ("written", self.made.said)]

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def concat(paths: Sequence[Path], out: Path, options: MergeOptions, *, rank: int | None = None) -> Combined:
    """Write the weighted sum of adapters as one plain LoRA: exact, or the nearest of a smaller `rank`.

    Raises UserError where one is more than LoRA of weights, or of another base.
    """
    from peftkit.model.base.identity import IDENTITY, base_identity
    from peftkit.ship.files.folder import TOKENIZER

    pass  # MOVED

    if options.combine != "sum":
        got, fix = f"{options.combine} with --as-adapter", "leave out --as-adapter, or --combine"
        raise UserError(Problem("--combine", got, "sum", fix))
    out = new_folder(out)
    adapters = adapters_of(paths, options)
    first, weights = adapters.found[0], adapters.how.weights
    with interrupt.listening(), problems_told(out), publish_folder(out) as staging:
        made = concatenate(
            adapters.sources,
            weights,
            first.config,
            staging,
            rank=rank,
            parameters=adapters.parameters,
        )
        write_sealed(staging / IDENTITY, {"base": base_identity(first.source, first.base)})
        for path in sorted({path for pattern in TOKENIZER for path in first.folder.glob(pattern)}):
            shutil.copyfile(path, staging / path.name)
    names = tuple((str(a.folder), weight) for a, weight in zip(adapters.found, weights, strict=True))
    return Combined(str(out), names, made)
