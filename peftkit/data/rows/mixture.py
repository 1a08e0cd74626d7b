"""The mixture of a recipe's sources: shares, row counts, splits. Pure but for the seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from peftkit.data.formats import CLASSES, PREFERENCES
from peftkit.errors import Problem, UserError
from peftkit.recipe.paths import is_data_path, redact_url
from peftkit.recipe.schema import Data, Source

KeyLocator = Callable[[tuple[str, ...]], str]


@dataclass(frozen=True)
class SourceRows:
    """Rows [start, stop) of the rows on disk that came from one source."""

    source: Source
    format: str
    start: int
    stop: int


def sample_mixture(parts: Sequence[SourceRows], seed: int, where: str) -> Iterator[Iterable[int]]:
    """Yield the row numbers of each source that go into the mixture, none twice.

    Raises UserError for weights on only some sources, and for more rows than a source has.
    """
    weights = [part.source.weight for part in parts]
    if any(weights) and not all(weights):
        got = f"weights for {sum(w is not None for w in weights)} of {len(parts)} sources"
        raise UserError(Problem(where, got, "a weight for each", "or rows: N for those that have none"))
    sizes = [min(p.stop - p.start, p.source.rows or p.stop - p.start) for p in parts]
    if all(weights):
        scale = min(size / (weight or 1) for size, weight in zip(sizes, weights, strict=True))
        sizes = [max(1, round(scale * (weight or 1))) for weight in weights]
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        num_rows, num_requested = part.stop - part.start, part.source.rows
        if num_requested is not None and num_requested > num_rows:
            got = f"rows: {num_requested} of {redact_url(part.source.path)}, which has {num_rows:,}"
            fix = "no row is taken twice: raise train.epochs"
            raise UserError(Problem(where, got, f"at most {num_rows}", fix))
        row_numbers = range(part.start, part.stop)
        yield (
            row_numbers
            if size == num_rows
            else sorted(random.Random(f"{seed} of source {number}").sample(row_numbers, size))
        )


def common_format(parts: Sequence[SourceRows], where: str) -> str:
    """Return the format of all parts, or "mixed" where several kinds of text are trained on together.

    Raises UserError for formats of different tasks.
    """
    names = list(dict.fromkeys(part.format for part in parts))
    if len(names) > 1 and any(name in CLASSES | PREFERENCES for name in names):
        got = f"rows of the formats {', '.join(names)}"
        raise UserError(Problem(where, got, "one task for all sources", "train them separately, or map their columns"))
    return names[0] if len(names) == 1 else "mixed"


def held_out_sources(data: Data, where: KeyLocator) -> list[Source]:
    """Return the sources of held-out rows: a file, or another split of the hub datasets that are trained on.

    Raises UserError for a split where some source is a file.
    """
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
