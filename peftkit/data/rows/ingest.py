"""Read a recipe's data once: rows become examples on disk, what is odd is noted, and a part is held out.

Memory does not grow with the data, and the same data is not read twice: the result is kept by content hash.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.data.formats import BadRow, Example, reader
from peftkit.data.formats.columns import renamer
from peftkit.data.read import Fault, Located, Row
from peftkit.data.rows import cache
from peftkit.data.rows.disk import Lines, Writer, load_numbers, save_numbers
from peftkit.data.rows.examples import NUMBERS, Examples, Kept, hash_of, numbers_of
from peftkit.data.rows.lazy import Mapped, Picked
from peftkit.data.rows.mixture import Part, Where, drawn, format_of, held_sources
from peftkit.data.rows.scan_text import look
from peftkit.data.rows.split import split_share, without_near
from peftkit.data.rows.tally import Tally
from peftkit.errors import Problem, UserError
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.paths import shown
from peftkit.recipe.schema import Chat, Data, Source

# checks whose rows cannot be used: waived, they are left out; otherwise they stop the run
UNUSABLE = ("malformed-rows", "encoding", "missing-fields", "empty-answers", "roles")
LEFT_OUT = "left-out"  # rows that could not be used, whatever the check
_HEARD_ROWS = 1000  # between looks for a signal
_FIRST_ROWS = 100  # among which one has to tell the format
_TRAIN, _EVAL = ("data", "train"), ("data", "eval")
_FIXES = {
    "malformed-rows": "mend the file",
    "encoding": "convert the file to UTF-8",
    "missing-fields": "mend the rows, or map other columns",
    "empty-answers": "give an answer, or take the rows out",
    "roles": "end each chat with an assistant turn",
    "secrets": "take them out, and revoke them",
    "chosen-equals-rejected": "take the rows out",
}
_AS_WELL = ("secrets", "chosen-equals-rejected")


@dataclass(frozen=True)
class _Convert:
    """What makes examples of rows."""

    format: str
    rename: Callable[[Row], Row]
    read: Callable[[Row], Example]


class _Reading:
    """Rows of all sources on their way to disk."""

    def __init__(self, data: Data, folder: Path, where: Where) -> None:
        self.data, self.folder, self.where = data, folder, where
        self.rows = Writer(folder / "rows.jsonl")
        self.tally = Tally()
        self.numbers = {name: array("Q") for name in NUMBERS}
        self.units = array("Q")
        self.weighted = False

    def take(self, located: Located) -> Part:
        """Read one source. Raises UserError where no row of it can be used."""
        start, before, source = len(self.rows), self.tally.to_json(), located.source
        convert: _Convert | None = None
        waiting: list[Row] = []  # first rows that say nothing of the format
        for row in located.rows():
            if isinstance(row, Fault):
                self._leave_out(row.kind, row.problem.where, _told(row.problem))
                continue
            waiting.append(row)
            if convert is None:
                try:
                    convert = self._converter(source, row)
                except UserError:
                    if len(waiting) == _FIRST_ROWS:
                        self._converter(source, waiting[0])
                    continue
            for one in waiting:
                self._take_row(one, convert)
            waiting.clear()
        if waiting:
            self._converter(source, waiting[0])
        if len(self.rows) == start or convert is None:
            problems = problems_of(self.tally, UNUSABLE) if self.tally.to_json() != before else []
            raise UserError(problems or Problem(shown(source.path), "no rows", "at least one row"))
        return Part(source, convert.format, start, len(self.rows))

    def _converter(self, source: Source, row: Row) -> _Convert:
        """What makes examples of rows, by the columns of one. Raises UserError where they do not fit."""
        columns = self.data.columns if source.columns is None else source.columns
        rename = renamer(columns, row, self.where(("data", "columns")))
        try:
            renamed = rename(row)
        except BadRow as bad:  # a line of columns that this row does not fill
            raise UserError(Problem(row.where, bad.got, bad.expected)) from None
        name, read = reader(renamed, source.format or self.data.format)
        return _Convert(name, rename, read)

    def _take_row(self, row: Row, convert: _Convert) -> None:
        if len(self.units) % _HEARD_ROWS == 0:
            interrupt.stop_if_requested("interrupted while reading")
        try:
            self._keep(adjusted(convert.read(convert.rename(row)), self.data.chat), row)
        except BadRow as bad:
            self._leave_out(bad.check, row.where, f"{bad.got}, expected {bad.expected}")

    def _leave_out(self, check: str, where: str, what: str) -> None:
        self.tally.add(check, where, what)
        self.tally.add(LEFT_OUT, where, check)

    def _keep(self, example: Example, row: Row) -> None:
        group = self.data.group if isinstance(self.data.eval, float) else None
        unit = None if group is None else hash_of(str(_group(row, group)))
        look(example, self.tally)
        self.weighted |= example.weight != 1.0 or any("weight" in turn for turn in example.messages)
        self.rows.append(example.to_json())
        for name, value in zip(NUMBERS, numbers_of(example), strict=True):
            self.numbers[name].append(value)
        self.units.append(self.numbers["input_hash"][-1] if unit is None else unit)

    def close(self, **numbers: array[int]) -> None:
        """Write out what is kept beside the rows."""
        self.rows.close()
        for name, values in {**self.numbers, **numbers}.items():
            save_numbers(self.folder / f"{name}.u64", values)


def _group(row: Row, column: str) -> Any:
    if column not in row.fields:
        raise BadRow(f"no column {column}", "the column that data.group names")
    return row.fields[column]


def _told(problem: Problem) -> str:
    return f"{problem.got}, expected {problem.expected}"


def adjusted(example: Example, chat: Chat) -> Example:
    """The example with the recipe's system prompt, and without reasoning where that is dropped."""
    turns = example.messages
    if not turns or (chat.system is None and chat.thinking == "keep"):
        return example
    given = example.num_given
    if chat.thinking == "drop":
        turns = tuple(_without_reasoning(turn) for turn in turns)
    if chat.system is not None and turns[0]["role"] != "system":
        turns = ({"role": "system", "content": chat.system}, *turns)
        given += 1 if given else 0
    return replace(example, messages=turns, num_given=given)


def _without_reasoning(turn: Any) -> Any:
    """An assistant's turn without its reasoning field, and without a leading <think> block."""
    if turn["role"] != "assistant":
        return turn
    content = turn["content"]
    if content.lstrip().startswith("<think>") and "</think>" in content:
        content = content.split("</think>", 1)[1].lstrip("\n")
    return {**{k: v for k, v in turn.items() if k != "reasoning_content"}, "content": content}


def ingest(data: Data, *, seed: int, where: Where) -> Examples:
    """The examples of a recipe's data, read and split, from the cache where they were read before.

    Rows that cannot be used are noted in the tally and left out. Raises UserError for what is missing, for a
    source of which no row can be used, and for columns and mixtures that do not fit.
    """
    held = held_sources(data, where)
    train = [Located(source, where=where(_TRAIN)) for source in data.sources]
    evaluation = [Located(source, where=where(_EVAL)) for source in held]
    key = cache.key_of(
        sources=[[one.source.model_dump(), one.key()] for one in (*train, *evaluation)],
        data=data.model_dump(include={"eval", "group", "format", "columns", "chat"}),
        seed=seed,
    )
    found = cache.find("rows", key)
    if found is None:
        with cache.making("rows", key) as folder:
            meta = _read_all(data, train, evaluation, folder, seed=seed, where=where)
            found = cache.publish(folder, "rows", key, meta), meta
    return _opened(*found, key)


def _read_all(
    data: Data,
    train: Sequence[Located],
    evaluation: Sequence[Located],
    folder: Path,
    *,
    seed: int,
    where: Where,
) -> dict[str, Any]:
    """Fill a folder with the rows of all sources. Returns what is to be known of them."""
    reading = _Reading(data, folder, where)
    parts = [reading.take(one) for one in train]
    name = format_of(parts, where(_TRAIN))
    kept, held, num_near = array("Q"), array("Q"), 0
    for numbers in drawn(parts, seed, where(_TRAIN)):
        kept.extend(numbers)
    if name != "mixed":
        reading.data = data.model_copy(update={"format": name})  # held-out rows are of the same format
    for one in evaluation:
        part = reading.take(one)
        format_of([*parts, part], where(_EVAL))
        held.extend(range(part.start, part.stop))
    if isinstance(data.eval, float) and data.eval > 0:
        kept, held, num_near = _split(data.eval, kept, reading, seed)
    reading.close(train=kept, eval=held)
    told = {"format": name, "num_near": num_near, "weighted": reading.weighted}
    return {**told, "tally": reading.tally.to_json()}


def _split(
    share: float, kept: array[int], reading: _Reading, seed: int
) -> tuple[array[int], array[int], int]:
    """(rows to train on, rows held out, how many went back to training)."""
    units = [reading.units[number] for number in kept]
    places, num_near = split_share(units, share, seed), 0
    if places:
        rows = Lines(reading.folder / "rows.jsonl", Example.from_json, places=reading.rows.flush())
        places, num_near = without_near(
            Mapped(Picked(rows, kept), lambda example: example.key), units, places
        )
    return (
        array("Q", (n for place, n in enumerate(kept) if place not in places)),
        array("Q", (n for place, n in enumerate(kept) if place in places)),
        num_near,
    )


def _opened(folder: Path, meta: Any, key: str) -> Examples:
    """The examples that a folder keeps."""
    rows = Lines(folder / "rows.jsonl", Example.from_json)
    found = {name: load_numbers(folder / f"{name}.u64") for name in ("train", "eval", *NUMBERS)}

    def kept(name: str) -> Kept:
        columns = {column: array("Q", map(found[column].__getitem__, found[name])) for column in NUMBERS}
        return Kept(rows, found[name], name=f"{key}-{name}", columns=columns)

    tally = Tally.from_json(meta["tally"])
    return Examples(
        kept("train"), kept("eval"), meta["format"], tally, meta["num_near"], weighted=meta["weighted"]
    )


def problems_of(tally: Tally, checks: Iterable[str]) -> list[Problem]:
    """The rows that checks found, as problems; each check lists its first few and counts the others."""
    problems = []
    for check in checks:
        noticed = tally.of(check)
        for where, what in noticed.rows:
            got, _, expected = what.partition(", expected ")
            problems.append(Problem(where, got, expected or "a row that can be used"))
        if noticed.count > len(noticed.rows):
            got = f"{noticed.count - len(noticed.rows)} more rows like these"
            problems.append(Problem("data", got, "none", _FIXES.get(check, "")))
    return problems


def refuse_unusable(examples: Examples, waived: Sequence[str]) -> None:
    """Raises UserError for rows that cannot be used, by file and line, unless their check is waived.

    What else would stop a run and shows in reading is told with them.
    """
    problems = problems_of(examples.tally, [check for check in UNUSABLE if check not in waived])
    if problems:
        problems += problems_of(examples.tally, [check for check in _AS_WELL if check not in waived])
        names = [c for c in (*UNUSABLE, *_AS_WELL) if c not in waived and examples.tally.of(c).count]
        fix = f"or data.waive: [{', '.join(names)}]: rows that cannot be used are then left out"
        last = problems[-1]
        problems[-1] = replace(last, fix=f"{last.fix}; {fix}" if last.fix else fix)
        raise UserError(problems)


def read(loaded: LoadedRecipe) -> Examples:
    """The recipe's data, read and split. Raises UserError for rows that cannot be used, unless waived."""
    data = loaded.recipe.data
    found = ingest(data, seed=loaded.recipe.seed, where=loaded.where)
    refuse_unusable(found, data.waive)
    return found
