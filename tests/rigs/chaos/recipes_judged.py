"""What has to come of a recipe, valid or broken: loaded as written, planned, or refused in words."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftkit.recipe.schema import Recipe
from tests.rigs.chaos.recipes import Case, make
from tests.rigs.chaos.watch import Run, WrongSuccess

_PATHS = (("base", "id"), ("data", "train"), ("data", "eval"), ("data", "chat", "template"))


def _leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(data, dict) and path not in _PATHS:
        for name, value in data.items():
            yield from _leaves(value, (*path, name))
    elif data != {} or path in _PATHS:
        yield path, data


def _compare(written: dict[str, Any], recipe: Recipe) -> None:
    """Every value that was written is there, as it was written."""
    dumped = recipe.model_dump()
    for path, value in _leaves(written):
        found: Any = dumped
        for part in path:
            found = found[part]
        if path in _PATHS:
            continue
        if not _equal(value, found):
            raise WrongSuccess(f"{'.'.join(path)}: {value!r} was written, {found!r} was read")


def _equal(written: Any, read: Any) -> bool:
    """Whether a value is what was written: shares may be, in percent, and sections have their defaults."""
    if isinstance(written, list) and isinstance(read, list):
        return len(written) == len(read) and all(map(_equal, written, read))
    if isinstance(written, dict):
        return all(_equal(value, read[name]) for name, value in written.items())
    if isinstance(written, str) and isinstance(read, float):
        return math.isclose(float(written.rstrip("% ")) / 100, read)
    if isinstance(written, float):
        return math.isclose(written, read)
    return bool(written == read) and isinstance(written, bool) == isinstance(read, bool)


def _round_trip(path: Path) -> None:
    from peftkit.recipe.document import dump_text, parse_text, read_document

    data = read_document(path).data
    if repr(parse_text(dump_text(data), name="again").data) != repr(data):
        raise WrongSuccess("what was read is not what is read of its dump")


def _ended(arguments: list[str]) -> int:
    """How the command line ends, in this process."""
    from peftkit.cli import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return main(arguments)
        except SystemExit as end:
            return int(end.code or 0)


def check(case: Case, folder: Path, *, through_cli: bool) -> str:
    """Load and plan a case. Returns what became of it; raises where that is wrong."""
    from peftkit.api import load_recipe, make_plan
    from peftkit.errors import UserError
    from tests.rigs.chaos.watch import check_told

    for name, content in {**case.files, "recipe.yaml": case.text}.items():
        (folder / name).write_bytes(content)
    (folder / "case.json").write_text(json.dumps([case.what, case.expected, case.overrides]))
    path, verdict, stage = folder / "recipe.yaml", "accepted", "loaded"
    try:
        loaded = load_recipe(path, case.overrides)
        if case.data is not None:
            _compare(case.data, loaded.recipe)
        _round_trip(path)
        if case.expected == "refused":
            raise WrongSuccess(f"{case.what}, and it loads: {case.text[:300]!r} {case.overrides!r}")
        stage = "planned"
        make_plan(loaded)
        if case.expected == "refused when planned":
            raise WrongSuccess(f"{case.what}, and it is planned: {case.text[:300]!r}")
    except UserError as error:
        check_told(error)
        verdict = "refused"
        if case.expected == "plans" or (case.expected == "loads" and stage == "loaded"):
            raise WrongSuccess(f"{case.what}, and it is not {stage}: {error}") from None
    if through_cli and not any(text.startswith("-") or "\0" in text for text in case.overrides):
        code = _ended(["finetune", "--dry-run", str(path), *case.overrides])
        if code != (0 if verdict == "accepted" else 2):
            raise WrongSuccess(f"{case.what}: {verdict}, and the command ends with {code}")
    return verdict


def open_recipes(shared: Path) -> Run:
    """Ready to run cases: data beside every recipe, one of ten through the command line too."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = [{"prompt": f"Say number {i}", "completion": f"number {i}"} for i in range(24)]
    text = "".join(json.dumps(row) + "\n" for row in rows)

    def run(rng: random.Random, folder: Path) -> str:
        os.environ["PEFTKIT_CACHE"] = str(folder / "cache")
        (folder / "rows.jsonl").write_text(text)
        (folder / "held.jsonl").write_text(text.replace("number", "digit"))
        case = make(rng)
        return check(case, folder, through_cli=rng.random() < 0.1)

    return run
