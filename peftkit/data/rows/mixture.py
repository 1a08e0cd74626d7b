"""Which rows of which sources make up the data: shares, counts, splits. Pure but for the seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from peftkit.data.formats import CLASSES
from peftkit.errors import Problem, UserError
from peftkit.recipe.paths import is_data_path, shown
from peftkit.recipe.schema import Data, Source

Where = Callable[[tuple[str, ...]], str]


@dataclass(frozen=True)
class Part:
    """What one source gave: rows [start, stop) of the spill."""

    source: Source
    format: str
    start: int
    stop: int


def drawn(parts: Sequence[Part], seed: int, where: str) -> Iterator[Iterable[int]]:
    """The rows of each source that go into the mixture: as many as asked, none twice."""
    weights = [part.source.weight for part in parts]
    if any(weights) and not all(weights):
        got = f"weights for {sum(w is not None for w in weights)} of {len(parts)} sources"
        raise UserError(Problem(where, got, "a weight for each", "or rows: N for those that have none"))
    sizes = [min(p.stop - p.start, p.source.rows or p.stop - p.start) for p in parts]
    if all(weights):
        scale = min(size / (weight or 1) for size, weight in zip(sizes, weights, strict=True))
        sizes = [max(1, round(scale * (weight or 1))) for weight in weights]
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        there, wanted = part.stop - part.start, part.source.rows
        if wanted is not None and wanted > there:
            got = f"rows: {wanted} of {shown(part.source.path)}, which has {there:,}"
            fix = "no row is taken twice: raise train.epochs"
            raise UserError(Problem(where, got, f"at most {there}", fix))
        everything = range(part.start, part.stop)
        yield (everything if size == there else sorted(_random(seed, number).sample(everything, size)))


def _random(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed} of source {number}")


def format_of(parts: Sequence[Part], where: str) -> str:
    """The one format, or "mixed" where rows of several kinds of text are learnt together."""
    names = list(dict.fromkeys(part.format for part in parts))
    if len(names) > 1 and any(name in CLASSES or name == "preference" for name in names):
        got = f"rows of the formats {', '.join(names)}"
        raise UserError(Problem(where, got, "one task for all", "train them apart, or map their columns"))
    return names[0] if len(names) == 1 else "mixed"


def held_sources(data: Data, where: Where) -> list[Source]:
    """Sources of held-out rows: a file, or another split of the hub datasets that are trained on."""
    if isinstance(data.eval, Source):
        return [data.eval]
    if not isinstance(data.eval, str):
        return []
    if is_data_path(data.eval):
        return [Source(path=data.eval)]
    if any(is_data_path(source.path) for source in data.sources):
        expected = "a file or a share: only hub datasets have splits"
        raise UserError(Problem(where(("data", "eval")), repr(data.eval), expected, "for example eval: 5%"))
    return [source.model_copy(update={"split": data.eval, "rows": None}) for source in data.sources]
