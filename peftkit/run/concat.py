"""Several adapters as one adapter: `peftkit merge A B --as-adapter`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftkit import interrupt
from peftkit.errors import Problem, UserError
from peftkit.run.merge_work import MergeOptions, adapters_of
from peftkit.run.place import new_folder, problems_told
from peftkit.rundir import publish_folder, write_sealed
from peftkit.ship.concat import Concatenated
from peftkit.units import html_table


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
    from peftkit.model.identity import IDENTITY, base_identity
    from peftkit.ship.concat import concatenate
    from peftkit.ship.folder import TOKENIZER

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
