"""Ingestion of a recipe's data: rows become examples on disk, checks are tallied, and a share is held out.

Memory does not grow with the data, and the same data is not read twice: the result is cached by content hash.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.data.formats import CLASSES, FORMATS, PREFERENCES, BadRow, Example, select_reader
from peftkit.data.formats.base import as_boolean
from peftkit.data.formats.columns import columns_of_templates, make_renamer
from peftkit.data.formats.unused import resembles, unused_values
from peftkit.data.read import Fault, LocatedSource, Row
from peftkit.data.rows import cache
from peftkit.data.rows.disk import JsonLinesReader, JsonLinesWriter, load_numbers, save_numbers
from peftkit.data.rows.examples import ROW_STATISTICS, Examples, StoredExamples, row_statistics, text_hash
from peftkit.data.rows.lazy import MappedSequence, Subset
from peftkit.data.rows.mixture import KeyLocator, SourceRows, common_format, held_out_sources, sample_mixture
from peftkit.data.rows.scan_text import scan_text
from peftkit.data.rows.split import hold_out_share, without_near_duplicates
from peftkit.data.rows.tally import Tally
from peftkit.errors import Problem, UserError
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.paths import redact_url
from peftkit.recipe.schema import Chat, Data, Source

# checks whose rows cannot be used: waived, they are left out; otherwise they stop the run
UNUSABLE_CHECKS = ("malformed-rows", "encoding", "missing-fields", "empty-answers", "roles", "media", "rated-answers")
LEFT_OUT = "left-out"  # rows that could not be used, whatever the check
_INTERRUPT_CHECK_ROWS = 1000  # between looks for a signal
_FORMAT_ROWS = 100  # among which one has to tell the format
_TRAIN_KEY, _EVAL_KEY = ("data", "train"), ("data", "eval")
_FIXES = {
    "malformed-rows": "fix the file",
    "encoding": "name the file's encoding: {path: FILE, encoding: windows-1252} or another; or convert it to UTF-8",
    "missing-fields": "fix the rows, or map other columns",
    "empty-answers": "give an answer, or remove the rows",
    "roles": "end each chat with an assistant turn",
    "rated-answers": "keep the good answers and remove the column; where it rates nothing, name data.format",
    "media": "train on the text alone by removing the column, or use a tool that trains vision models",
    "secrets": "remove them, and revoke the secrets",
    "chosen-equals-rejected": "remove the rows",
}
_ALSO_REPORTED_CHECKS = ("secrets", "chosen-equals-rejected")


@dataclass(frozen=True)
class _RowConverter:
    """Conversion of one source's rows to examples: format, column renaming, parser, the columns it reads."""

    format: str
    rename: Callable[[Row], Row]
    read: Callable[[Row], Example]
    used: frozenset[str]
    refuses_ratings: bool  # nobody said that a column of ratings is another thing


class _Ingestion:
    """State of an ingestion: rows of all sources on their way to disk."""

    def __init__(self, data: Data, folder: Path, where: KeyLocator) -> None:
        self.data, self.folder, self.where = data, folder, where
        self.format_given = data.format  # by the user: held-out rows are read as those trained on
        self.rows = JsonLinesWriter(folder / "rows.jsonl")
        self.tally = Tally()
        self.numbers = {name: array("Q") for name in ROW_STATISTICS}
        self.units = array("Q")
        self.weighted = False
        self.unused: dict[str, Any] = {}  # by column: [rows, what it looks like]

    def take(self, located: LocatedSource) -> SourceRows:
        """Read one source. Raises UserError where no row of it can be used."""
        start, tally_before, source = len(self.rows), self.tally.to_json(), located.source
        converter: _RowConverter | None = None
        pending_rows: list[Row] = []  # first rows that say nothing of the format
        for row in located.rows():
            if isinstance(row, Fault):
                self._skip_row(row.kind, row.problem.where, f"{row.problem.got}, expected {row.problem.expected}")
                continue
            pending_rows.append(row)
            if converter is None:
                try:
                    converter = self._make_converter(source, row)
                except UserError:
                    if len(pending_rows) == _FORMAT_ROWS:
                        self._make_converter(source, pending_rows[0])
                    continue
            for pending_row in pending_rows:
                self._add_row(pending_row, converter)
            pending_rows.clear()
        if pending_rows:
            self._make_converter(source, pending_rows[0])
        if len(self.rows) == start or converter is None:
            problems = tally_problems(self.tally, UNUSABLE_CHECKS) if self.tally.to_json() != tally_before else []
            raise UserError(problems or Problem(redact_url(source.path), "no rows", "at least one row"))
        return SourceRows(source, converter.format, start, len(self.rows))

    def _make_converter(self, source: Source, row: Row) -> _RowConverter:
        """Make a source's converter from the columns of one row. Raises UserError where they do not fit."""
        columns = self.data.columns if source.columns is None else source.columns
        rename_columns = make_renamer(columns, row, self.where(("data", "columns")))
        try:
            renamed_row = rename_columns(row)
        except BadRow as error:  # a template in columns that cannot render this row
            raise UserError(Problem(row.where, error.got, error.expected)) from None
        of = "data." if source.columns is None else "this source's "
        name, parse = select_reader(renamed_row, source.format or self.data.format, columns, of)
        used = {*FORMATS[name].used_columns(renamed_row.fields), *([self.data.group] if self.data.group else [])}
        used |= columns_of_templates(columns)
        is_detected = (source.format or self.format_given) == "auto" and name not in CLASSES | PREFERENCES
        return _RowConverter(name, rename_columns, parse, frozenset(used), is_detected)

    def _add_row(self, row: Row, converter: _RowConverter) -> None:
        if len(self.units) % _INTERRUPT_CHECK_ROWS == 0:
            interrupt.stop_if_requested("interrupted while reading")
        try:
            renamed_row = converter.rename(row)
            for name, value in unused_values(renamed_row, converter.used):
                if converter.refuses_ratings and name in {"label", "kto_tag"} and as_boolean(value) is not None:
                    got = f"{name}: {value!r}, which rates the answer"
                    raise BadRow(got, "answers to learn", check="rated-answers")
                count = self.unused.setdefault(name, [0, resembles(name, value)])
                count[0] += 1
            example = apply_chat_options(converter.read(renamed_row), self.data.chat)
            if example.repairs and self.data.chat.repair == "off":
                got = f"turns out of order ({'; '.join(example.repairs)} with data.chat.repair: auto)"
                raise BadRow(got, "user and assistant turns in turn, a user or system turn first", check="roles")
            for repair in example.repairs:
                self.tally.add("repairs", row.where, repair)
            group = self.data.group if isinstance(self.data.eval, float) else None
            if group is not None and group not in row.fields:
                raise BadRow(f"no column {group}", "the column that data.group names")
            unit = None if group is None else text_hash(str(row.fields[group]))
            scan_text(example, self.tally)
            weights = (example.weight, *(turn.get("weight", 1.0) for turn in example.messages))
            self.weighted |= any(weight not in {0.0, 1.0} for weight in weights)  # those are masks
            self.rows.append(example.to_json())
            for name, value in zip(ROW_STATISTICS, row_statistics(example), strict=True):
                self.numbers[name].append(value)
            self.units.append(self.numbers["input_hash"][-1] if unit is None else unit)
        except BadRow as error:
            self._skip_row(error.check, row.where, f"{error.got}, expected {error.expected}")

    def _skip_row(self, check: str, where: str, detail: str) -> None:
        self.tally.add(check, where, detail)
        self.tally.add(LEFT_OUT, where, check)

    def close(self, **numbers: array[int]) -> None:
        """Write the statistics, and further `numbers` by name, beside the rows."""
        self.rows.close()
        for name, values in {**self.numbers, **numbers}.items():
            save_numbers(self.folder / f"{name}.u64", values)


def apply_chat_options(example: Example, chat: Chat) -> Example:
    """Apply the recipe's chat options: add its system prompt, and drop reasoning where it says so."""
    turns = example.messages
    if not turns or (chat.system is None and chat.thinking == "keep"):
        return example
    num_given = example.num_given
    if chat.thinking == "drop":
        turns = tuple(_drop_reasoning(turn) for turn in turns)
    if chat.system is not None and turns[0]["role"] != "system":
        turns = ({"role": "system", "content": chat.system}, *turns)
        num_given += 1 if num_given else 0
    return replace(example, messages=turns, num_given=num_given)


def _drop_reasoning(turn: Any) -> Any:
    """An assistant's turn without its reasoning field, and without a leading <think> block."""
    if turn["role"] != "assistant":
        return turn
    content = turn["content"]
    if content.lstrip().startswith("<think>") and "</think>" in content:
        content = content.split("</think>", 1)[1].lstrip("\n")
    return {**{k: v for k, v in turn.items() if k != "reasoning_content"}, "content": content}


def ingest(data: Data, *, seed: int, where: KeyLocator) -> Examples:
    """Read and split a recipe's data, or load it from the cache where it was read before.

    Rows that cannot be used are tallied and left out. Raises UserError for what is missing, for a source of
    which no row can be used, and for columns and mixtures that do not fit.
    """
    eval_sources = held_out_sources(data, where)
    train_readers = [LocatedSource(source, where=where(_TRAIN_KEY)) for source in data.sources]
    eval_readers = [LocatedSource(source, where=where(_EVAL_KEY)) for source in eval_sources]
    key = cache.content_key(
        sources=[[located.source.model_dump(), located.key()] for located in (*train_readers, *eval_readers)],
        data=data.model_dump(include={"eval", "group", "format", "columns", "chat"}),
        seed=seed,
    )
    entry = cache.find_entry("rows", key)
    if entry is None:
        with cache.new_entry("rows", key) as folder:
            meta = _read_sources(data, train_readers, eval_readers, folder, seed=seed, where=where)
            entry = cache.publish_entry(folder, "rows", key, meta), meta
    return _load_examples(*entry, key)


def _read_sources(
    data: Data,
    train_readers: Sequence[LocatedSource],
    eval_readers: Sequence[LocatedSource],
    folder: Path,
    *,
    seed: int,
    where: KeyLocator,
) -> dict[str, Any]:
    """Read all sources into a folder, and split them. Returns the entry's meta values."""
    ingestion = _Ingestion(data, folder, where)
    parts = [ingestion.take(located) for located in train_readers]
    format_name = common_format(parts, where(_TRAIN_KEY))
    train_rows, held_out_rows, num_near = array("Q"), array("Q"), 0
    for row_numbers in sample_mixture(parts, seed, where(_TRAIN_KEY)):
        train_rows.extend(row_numbers)
    if format_name != "mixed":
        ingestion.data = data.model_copy(update={"format": format_name})  # held-out rows are of the same format
    for located in eval_readers:
        part = ingestion.take(located)
        common_format([*parts, part], where(_EVAL_KEY))
        held_out_rows.extend(range(part.start, part.stop))
    if isinstance(data.eval, float) and data.eval > 0:
        # rows that a training row nearly repeats go back to training
        units = [ingestion.units[number] for number in train_rows]
        held_out, num_near_duplicates = hold_out_share(units, data.eval, seed), 0
        if held_out:
            rows = JsonLinesReader(ingestion.folder / "rows.jsonl", Example.from_json, offsets=ingestion.rows.flush())
            held_out, num_near_duplicates = without_near_duplicates(
                MappedSequence(Subset(rows, train_rows), lambda example: example.key), units, held_out
            )
        train_rows, held_out_rows, num_near = (
            array("Q", (row_number for index, row_number in enumerate(train_rows) if index not in held_out)),
            array("Q", (row_number for index, row_number in enumerate(train_rows) if index in held_out)),
            num_near_duplicates,
        )
    ingestion.close(train=train_rows, eval=held_out_rows)
    meta = {"format": format_name, "num_near": num_near, "weighted": ingestion.weighted, "unused": ingestion.unused}
    return {**meta, "tally": ingestion.tally.to_json()}


def _load_examples(folder: Path, meta: Any, key: str) -> Examples:
    """The examples that a folder keeps."""
    rows = JsonLinesReader(folder / "rows.jsonl", Example.from_json)
    row_numbers = {name: load_numbers(folder / f"{name}.u64") for name in ("train", "eval", *ROW_STATISTICS)}

    def kept(name: str) -> StoredExamples:
        columns = {
            column: array("Q", map(row_numbers[column].__getitem__, row_numbers[name])) for column in ROW_STATISTICS
        }
        return StoredExamples(rows, row_numbers[name], name=f"{key}-{name}", columns=columns)

    tally = Tally.from_json(meta["tally"])
    unused = {name: (count, looks) for name, (count, looks) in sorted(meta["unused"].items())}
    return Examples(
        kept("train"), kept("eval"), meta["format"], tally, meta["num_near"], weighted=meta["weighted"], unused=unused
    )


def tally_problems(tally: Tally, checks: Iterable[str]) -> list[Problem]:
    """Return tallied rows as problems: rows with the same fault are one, with their first places and count."""
    problems = []
    for check in checks:
        counted, places = tally.of(check), dict[str, list[str]]()
        for where, detail in counted.rows:
            places.setdefault(detail, []).append(where)
        for detail, (first, *others) in places.items():
            got, _, expected = detail.partition(", expected ")
            if others:
                num_rows = counted.count if len(places) == 1 else 1 + len(others)
                got = f"{got}, in {num_rows:,} rows, such as {', '.join([first, *others][:3])}"
            problems.append(Problem(first, got, expected or "a usable row"))
        num_more = counted.count - len(counted.rows)
        if num_more and len(places) > 1:
            problems.append(Problem("data", f"{num_more} more rows like these", "none"))
        if counted.count:
            problems[-1] = replace(problems[-1], fix=_FIXES.get(check, ""))
    return problems


def refuse_unusable_rows(examples: Examples, waived: Sequence[str]) -> None:
    """Raise UserError for rows that cannot be used, by file and line, unless their check is waived.

    Problems of other checks that are seen while reading are reported with them.
    """
    problems = tally_problems(examples.tally, [check for check in UNUSABLE_CHECKS if check not in waived])
    if problems:
        problems += tally_problems(examples.tally, [check for check in _ALSO_REPORTED_CHECKS if check not in waived])
        names = [
            name
            for name in (*UNUSABLE_CHECKS, *_ALSO_REPORTED_CHECKS)
            if name not in waived and examples.tally.of(name).count
        ]
        fix = f"or set data.waive: [{', '.join(names)}]: unusable rows are then left out"
        last_problem = problems[-1]
        problems[-1] = replace(last_problem, fix=f"{last_problem.fix}; {fix}" if last_problem.fix else fix)
        raise UserError(problems)


def read_examples(loaded: LoadedRecipe) -> Examples:
    """Read and split the recipe's data. Raises UserError for unusable rows, unless waived."""
    data = loaded.recipe.data
    examples = ingest(data, seed=loaded.recipe.seed, where=loaded.where)
    refuse_unusable_rows(examples, data.waive)
    return examples
